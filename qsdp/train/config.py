"""What a training run is told: one dataclass, whose fields are the flags of launch/train_gpt.py.

No torch here: a mistake on the command line is answered before torch is loaded.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from qsdp.config import QSDPConfig
from qsdp.models.registry import presets
from qsdp.sparsity.compression_target import Compression
from qsdp.train.method_flags import MethodFlags
from qsdp.train.run_flags import RunFlags
from qsdp.train.wire_flags import AUTO, WireFlags, flag

PRECISIONS = ("fp32", "bf16")
BACKENDS = ("nccl", "gloo")

# What a run looks at and keeps, and where; AC/DC's dense twin is chosen when it validates.
_RECORDS = (
    *("out", "resume", "keep", "save_every", "save_async", "eval_every"),
    *("tensorboard", "timeout_s", "take_over", "qsdp_errors", "max_bad_steps"),
)
_OF_THE_SCHEDULE = (
    *("acdc_warmup", "acdc_phase", "acdc_last_dense", "acdc_last_sparse"),
    *("gmp_sparsity", "gmp_initial", "gmp_start", "gmp_every", "gmp_end"),
)
_INPUTS = ("data", "tokenizer")  # their contents count, not where they lie
_NO_PATHS = ("stdlib", "char", "byte")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(WireFlags, MethodFlags, RunFlags):
    """Train a language model with FSDP2, optionally with a quantized wire (QSDP) and a method that
    makes it compress.

    Raises ValueError, in one sentence, for a value that no run can have.
    """

    one_shot: tuple[str, ...] | None = ("0.5", "0.7", "0.8", "0.9")
    """Targets to compress the final model to in one shot, each put back after its validation; as
    for --cram-targets, `none` for none."""

    tensorboard: bool = False
    """Also write TensorBoard events to OUT/tensorboard."""

    def __post_init__(self) -> None:
        if self.model not in presets():
            raise ValueError(f"--model is {self.model!r}; choose one of {', '.join(presets())}.")
        for name in (
            *("steps", "batch_size", "grad_accum", "seq_len"),
            *("replicas", "eval_batches", "keep", "max_bad_steps"),
        ):
            self._require(name, getattr(self, name) >= 1, "choose 1 or more")
        for name in ("warmup_steps", "eval_every", "save_every"):
            self._require(name, getattr(self, name) >= 0, "choose 0 or more")
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            # Python's integers would outgrow all other arithmetic.
            is_large = isinstance(value, int) and value >= 1 << 63
            self._require(name, not is_large, "choose an integer below 2**63")
        for name in ("weight_decay", "clip_grad", "cram_rho", "sam_rho"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "choose a number from 0")
        self._require("lr", 0 < self.lr < math.inf, "choose a number above 0")
        self._require("min_lr", 0 <= self.last_lr <= self.lr, f"choose 0 to --lr, {self.lr:g}")
        self._require("beta2", 0 <= self.beta2 < 1, "choose a number from 0 to below 1")
        self._require("seed", 0 <= self.seed < 1 << 63, "choose an integer from 0 to 2**63 - 1")
        self._require("backend", self.backend in (None, *BACKENDS), "choose nccl or gloo")
        self._require("precision", self.precision in PRECISIONS, "choose fp32 or bf16")
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            # Surrogates stand for bytes of the command line that are not UTF-8.
            is_odd = isinstance(value, str) and re.search("[\0\ud800-\udfff]", value) is not None
            self._require(name, not is_odd, "give UTF-8 text")
        self._require("data", self.data != "", "give stdlib, a text file or a folder of shards")
        self._require("tokenizer", self.tokenizer != "", "choose char, byte or a JSON file")
        self._require("out", self.out != "", "give a folder")
        self._require("timeout_s", 1 <= self.timeout_s <= 1 << 31, "choose 1 second or more")
        self._require("resume", self.resume != "", "choose auto, none or a checkpoint's path")
        self._require(
            "cram_sparsity",
            bool(self.cram_sparsity) and all(0 <= s < 1 for s in self.cram_sparsity),
            "give numbers from 0 to below 1, with commas between",
        )
        for name in ("acdc_sparsity", "gmp_sparsity"):
            is_fraction = 0 <= getattr(self, name) < 1
            self._require(name, is_fraction, "choose a fraction from 0 to below 1")
        if self.save_async and not self.save_every:
            raise ValueError(
                "--save-async is given, but --save-every is 0, and of the only checkpoint the end "
                "waits anyway; raise --save-every, or leave --save-async out."
            )
        self.check_method(self.steps)
        try:
            _ = self.one_shot_targets
        except ValueError as error:
            raise ValueError(f"--one-shot: {error}.") from None
        if self.prunable is not None and not self.prunes and not self.one_shot_targets:
            raise ValueError(
                f"--prunable is {self.prunable!r}, but no method is to prune, and --one-shot is "
                "none, so that nothing would heed it; add one, or leave it out."
            )
        if self.min_lr is not None and self.warmup_steps >= self.steps - 1:
            raise ValueError(
                f"--min-lr is {self.min_lr:g}, but of {self.steps} steps none follows the warm-up "
                f"of {self.warmup_steps}; shorten --warmup-steps, or leave it out."
            )
        self.check_wire_steps(self.passes * self.steps)  # raises for what it cannot be too
        if self.qsdp_bits == AUTO and self.replicas > 1:
            raise ValueError(
                f"--replicas is {self.replicas} beside --qsdp-bits {AUTO}, which does not measure "
                "what replicas average; give bits, or leave out one of the two."
            )

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{flag(name)} is {getattr(self, name)!r}; {allowed}.")

    @property
    def last_lr(self) -> float:
        """The learning rate of the last step."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def one_shot_targets(self) -> tuple[Compression, ...]:
        """What the final model is compressed to."""
        texts = self.one_shot or ()
        return () if texts == ("none",) else tuple(map(Compression.of, texts))

    @property
    def wire(self) -> QSDPConfig | None:
        """What crosses the wire, None for stock FSDP2, and for `auto` until it is `resolved`."""
        return self.wire_config(self.seed)

    def resolved(self, settings: Mapping[str, Any]) -> TrainConfig:
        """The same run with the flags of the wire that --qsdp-bits auto has come to."""
        return replace(self, out=str(self.out_dir), **settings)

    @property
    def out_dir(self) -> Path:
        """Where results go: `out`, or a folder named after what sets the run apart."""
        if self.out is not None:
            return Path(self.out)
        inputs = {name: getattr(self, name) for name in _INPUTS}
        apart = self.identity | {
            name: text if text in (None, *_NO_PATHS) else str(Path(text).absolute())
            for name, text in inputs.items()
        }
        parts = [
            self.model,
            Path(self.data).stem or "data",
            *self.folder_parts(self.seed),
            *([f"replicas{self.replicas}"] if self.replicas > 1 else []),
            *self.method_parts,
            f"seed{self.seed}",
            blake2b(json.dumps(apart, sort_keys=True).encode(), digest_size=4).hexdigest(),
        ]
        return Path("out", "-".join(parts))

    @property
    def resumes_own(self) -> bool:
        """Whether `resume` names the folder of results itself."""
        return os.path.realpath(self.resume) == os.path.realpath(self.out_dir)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that change a run's numbers, but for its data, as `as_dict` has them."""
        left_out = {*_RECORDS, *_INPUTS} - ({"eval_every"} if self.acdc else set())
        chosen = {
            name: value
            for name, value in self._values().items()
            if name not in left_out and not name.startswith("qsdp_")
        }
        # What was given in two ways may be the same.
        chosen |= {"min_lr": self.last_lr}
        if self.qsdp_bits == AUTO:
            chosen["qsdp_bits"] = AUTO
        if self.wire is not None:
            chosen |= {f"qsdp_{name}": value for name, value in asdict(self.wire).items()}
            chosen["qsdp_level_steps"] = list(self.wire.learning_steps)
        if self.cram:
            chosen["cram_targets"] = [str(target) for target in self.targets]
            del chosen["cram_sparsity"]
        if self.acdc:
            chosen["acdc_target"] = str(self.acdc_compression)
            del chosen["acdc_sparsity"]
        schedule = self.mask_schedule(self.steps)
        if schedule is not None:
            chosen["schedule"] = asdict(schedule)
        return {n: v for n, v in chosen.items() if n not in _OF_THE_SCHEDULE}

    def as_dict(self) -> dict[str, Any]:
        """All fields, `out` resolved, as JSON and TOML can hold them; unset ones are left out."""
        return self._values() | {"out": str(self.out_dir)}

    def _values(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }

    def to_toml(self) -> str:
        """A file that --config reads back as this configuration, but for `resume`, whose `none`
        would delete the very run that the file was taken from, and `take_over`."""
        # JSON's strings, numbers, booleans and lists are TOML's too, but for two things: TOML has
        # no pairs of surrogates, and wants DEL escaped.
        lines = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
            for name, value in self.as_dict().items()
            if name not in ("resume", "take_over")
        ]
        return "".join(lines).replace("\x7f", "\\u007f")
