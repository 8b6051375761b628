"""What a training run is told: groups of settings, the flags of ``qsdp train``.

No torch here: a mistake on the command line is answered before torch is loaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self, get_type_hints

from qsdp.common.flags import Flags
from qsdp.config import QSDPConfig
from qsdp.data.flags import DataFlags
from qsdp.methods.method import Method
from qsdp.methods.registry import check_methods, chosen, method_classes, unchosen
from qsdp.models.registry import preset_defaults
from qsdp.sparsity.flags import CompressionFlags
from qsdp.train.output_flags import OutputFlags
from qsdp.train.run_flags import RunFlags
from qsdp.train.wire_flags import AUTO, WireFlags

GROUPS: dict[str, type[Flags]] = {
    "run": RunFlags,
    "data": DataFlags,
    "output": OutputFlags,
    "compression": CompressionFlags,
    "wire": WireFlags,
}
"""The groups that every run has, by the field of ``TrainConfig``."""

# What is no part of a run where it is unset: names of folders were made without it.
_LATER = (
    *("qsdp_delta_room", "qsdp_delta_redraw_every", "qsdp_weight_bucket_size"),
    "qsdp_grad_budget",
    "qsdp_grad_rotation",
)
# What a run looks at and keeps, and where.
_RECORDS = (
    *("out", "resume", "keep", "save_every", "save_async", "eval_every"),
    *("tensorboard", "timeout_s", "take_over", "max_bad_steps"),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    The settings of all groups have one list of names, in which ``of`` takes them and files hold
    them: those of the flags, with underscores. Raises ValueError, in one sentence, for a value that
    no run can have.
    """

    run: RunFlags = field(default_factory=RunFlags)
    data: DataFlags = field(default_factory=DataFlags)
    output: OutputFlags = field(default_factory=OutputFlags)
    compression: CompressionFlags = field(default_factory=CompressionFlags)
    wire: WireFlags = field(default_factory=WireFlags)
    methods: tuple[Method, ...] = field(default_factory=unchosen)
    """The flags of every method; the run is of at most one of them."""

    def __post_init__(self) -> None:
        if self.run.model not in preset_defaults():
            raise ValueError(
                f"--model is {self.run.model!r}: choose one of {', '.join(preset_defaults())}."
            )
        for group in self._groups():
            for name, value in group.values().items():
                # Python's integers would outgrow all other arithmetic.
                is_large = isinstance(value, int) and value >= 1 << 63
                group.require(name, not is_large, "choose an integer below 2**63")
                # Surrogates stand for bytes of the command line that are not UTF-8.
                is_odd = isinstance(value, str) and re.search("[\0\ud800-\udfff]", value)
                group.require(name, not is_odd, "give UTF-8 text")
        self.run.check()
        self.data.check()
        self.output.check()
        check_methods(self.methods, self.run.steps)
        self.compression.check(prunes=self.method.PRUNES)
        self.wire.check_steps(self.method.PASSES * self.run.steps)  # and for what it cannot be
        if self.wire.qsdp_bits == AUTO and self.run.replicas > 1:
            raise ValueError(
                f"--replicas is {self.run.replicas} beside --qsdp-bits {AUTO}, which does not "
                "measure what replicas average: give bits, or leave out one of the two."
            )

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """The run of these settings, by the names of their flags; the others are as by default.

        Raises TypeError for a name that no setting has.
        """
        if odd := settings.keys() - setting_types().keys():
            raise TypeError(
                f"there is no setting {sorted(odd)[0]!r}: choose one of `setting_types`."
            )
        parts: dict[str, Any] = groups_from_settings(settings)
        methods = tuple(parts.pop(key) for key in method_classes())
        return cls(**parts, methods=methods)

    def changed(self, **settings: Any) -> Self:
        """The same run except for these settings, by the names of their flags."""
        return type(self).of(**self.settings() | settings)

    def settings(self) -> dict[str, Any]:
        """All settings, by the names of their flags."""
        return {name: value for group in self._groups() for name, value in group.values().items()}

    def _groups(self) -> Iterator[Flags]:
        yield from (getattr(self, key) for key in GROUPS)
        yield from self.methods

    @property
    def method(self) -> Method:
        """The method of the run; ``Method`` itself, plain AdamW, where none is chosen."""
        return chosen(self.methods)

    @property
    def qsdp(self) -> QSDPConfig | None:
        """What crosses the wire; None for stock FSDP2, and for ``auto`` until ``resolved``."""
        return self.wire.config(self.run.seed)

    def resolved(self, settings: Mapping[str, Any]) -> Self:
        """The same run with the flags of the wire that --qsdp-bits auto has come to."""
        return replace(
            self,
            output=replace(self.output, out=str(self.out_dir)),
            wire=replace(self.wire, **settings),
        )

    @property
    def out_dir(self) -> Path:
        """Where results go: ``out``, or a folder named after what sets the run apart."""
        if self.output.out is not None:
            return Path(self.output.out)
        apart = json.dumps(self.identity | self.data.identity, sort_keys=True)
        run, method = self.run, self.method
        parts = [
            run.model,
            Path(self.data.data).stem or "data",
            *self.wire.folder_parts(run.seed),
            *([f"replicas{run.replicas}"] if run.replicas > 1 else []),
            *([method.KEY + method.details.replace(":", "of")] if method.KEY else []),
            f"seed{run.seed}",
            blake2b(apart.encode(), digest_size=4).hexdigest(),
        ]
        return Path("out", "-".join(parts))

    @property
    def resumes_own(self) -> bool:
        """Whether ``resume`` names the folder of results itself."""
        return os.path.realpath(self.output.resume) == os.path.realpath(self.out_dir)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that change a run's numbers, except its data, and the schedule of masks.

        They are as ``as_dict`` has them.
        """
        method = self.method
        kept = {"eval_every"} if method.IS_TIMED_BY_VALIDATION else set()
        found = self.run.stored() | self.output.stored() | self.compression.stored()
        found = {n: v for n, v in found.items() if n not in {*_RECORDS} - kept}
        # What was given in two ways may be the same.
        found["min_lr"] = self.run.last_lr
        if self.wire.qsdp_bits == AUTO:
            found["qsdp_bits"] = AUTO
        if self.qsdp is not None:
            found |= {f"qsdp_{name}": value for name, value in asdict(self.qsdp).items()}
            found["qsdp_level_steps"] = list(self.qsdp.learning_steps)
            if self.qsdp.gather == "delta":
                found["qsdp_delta_room"] = self.qsdp.room
                found["qsdp_delta_redraw_every"] = self.qsdp.redraw_every
            found = {n: v for n, v in found.items() if n not in _LATER or v not in (None, "none")}
            found.pop("qsdp_delta_codes")  # the same codes, wherever they are
        for each in self.methods:
            if each.is_chosen or each.IS_IN_EVERY_IDENTITY:
                found |= each.identity()
        schedule = method.schedule(self.run.steps)
        return found if schedule is None else found | {"schedule": asdict(schedule)}

    def as_dict(self) -> dict[str, Any]:
        """All settings by their names, as JSON and TOML can hold them; unset ones are left out.

        ``out`` is resolved.
        """
        stored = {n: value for group in self._groups() for n, value in group.stored().items()}
        return stored | {"out": str(self.out_dir)}

    def to_toml(self) -> str:
        """A file that --config reads back as this configuration, without ``resume``, ``take_over``.

        A ``none`` of ``resume`` would delete the very run that the file was taken from.
        """
        # JSON's strings, numbers, booleans and lists are TOML's too, but for two things: TOML has
        # no pairs of surrogates, and wants DEL escaped.
        lines = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
            for name, value in self.as_dict().items()
            if name not in ("resume", "take_over")
        ]
        return "".join(lines).replace("\x7f", "\\u007f")


def all_groups() -> dict[str, type[Flags]]:
    """The groups of settings, those of every method too."""
    return {**GROUPS, **method_classes()}


def setting_names(group: type[Flags]) -> list[str]:
    """The names of the settings in a group of the configuration."""
    return [field.name for field in fields(group)]


def groups_from_settings(settings: Mapping[str, Any]) -> dict[str, Flags]:
    """All groups of a run's configuration, by their names, with what they have of ``settings``.

    The others are as by default.
    """
    return {
        key: group(**{name: settings[name] for name in setting_names(group) if name in settings})
        for key, group in all_groups().items()
    }


@cache
def setting_types() -> dict[str, Any]:
    """The type of each setting, by its name."""
    groups = all_groups().values()
    hints = [(group, get_type_hints(group)) for group in groups]
    return {name: types[name] for group, types in hints for name in setting_names(group)}
