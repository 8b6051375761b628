"""The flags of the quantized wire, and the QSDPConfig that they come to. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Annotated, Any, Literal

import tyro

from qsdp.common.flags import Flags, flag
from qsdp.common.rounding import Rounding
from qsdp.common.user_errors import quoted
from qsdp.common.wire_values import Policy, check_config_bits
from qsdp.config import REDUCES, QSDPConfig

AUTO = "auto"
"""The word that has bits measured for, where others are given."""
BITS_OF_ONE_DIRECTION = ("qsdp_weight_bits", "qsdp_grad_bits")
CHOSEN = ("qsdp_bits", "qsdp_gather", "qsdp_reduce")
"""What ``auto`` may come to, in flags."""
_BITS = ("qsdp_bits", *BITS_OF_ONE_DIRECTION)
_ROUNDING = "; ".join(
    f"{each.label}: {each.properties.words}{', which is biased' * each.properties.is_biased}"
    for each in Rounding
)
_REDUCE = "; ".join(f"{name}: {words}" for name, words in REDUCES.items())


@dataclass(frozen=True, kw_only=True)
class WireFlags(Flags):
    """What crosses the wire; None, or False, is a flag that was not given."""

    qsdp_bits: int | Literal["auto"] | None = None
    """Bits a value on the wire for weights and gradients, 2 to 8, or auto. Unset: stock FSDP2.
    16 (bf16) and 32 (fp32) are baselines through the same collectives. auto measures the link,
    the codec and the computation for at most 10 seconds before the first step, and chooses what
    takes least: 8 or 4 bits, gathered once or twice, reduced flat or in two hops, or stock
    FSDP2. It says why, a run that resumes keeps the choice, and no other flag of the wire goes
    with it. As a flag it also replaces what --config says of weights or gradients alone, and
    auto what that says of gathers and reduces; beside flags for both weights and gradients it
    is refused.
    """

    qsdp_weight_bits: int | None = None
    """Bits a weight in the all-gather, in place of --qsdp-bits.
    32 if only the gradients' are given.
    """

    qsdp_grad_bits: int | None = None
    """Bits a gradient value in the reduce-scatter, in place of --qsdp-bits.
    32 if only the weights' are given.
    """

    qsdp_embedding_bits: int | None = None
    """Bits of embeddings and of the output head, both ways.
    Unset: those of other matrices, but at least 8.
    """

    qsdp_local_grad_bits: int | None = None
    """Bits a gradient value inside a node, where the reduce has two hops.
    Unset: those of gradients, but at least 8.
    """

    qsdp_bucket_size: int | None = None
    """Values that share one minimum and scale, a multiple of 8.
    Unset: 1024 for 7 and 8 bits; below, 128 for weights and 256 for gradients.
    """

    qsdp_weight_bucket_size: int | None = None
    """The same of weights alone, in place of --qsdp-bucket-size.
    Unset: as that says, and 128 with --qsdp-gather delta, which takes no more.
    """

    qsdp_rounding: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"{_ROUNDING}. Unset: shift for 7 and 8 bits, dither below. With --qsdp-gather "
            "delta weights take dither unless it is nearest."
        ),
    ] = None

    qsdp_levels: str | None = None
    """uniform, or learned for parameters of 2 to 6 bits. Unset: uniform.
    Learned levels are fitted to each parameter's values. With --qsdp-gather delta they are for
    gradients.
    """

    qsdp_level_steps: tuple[int, ...] | None = None
    """Steps before which levels are learned, with commas between, each from 1.
    Where a method takes two passes a step, each counts. Unset: 10,50,200,1000.
    """

    qsdp_grad_rotation: str | None = None
    """none, or hadamard for gradients of 2 to 6 bits and those that a budget gives bits.
    They are coded as Hadamard transforms of their buckets, which have few outliers. Unset: none.
    """

    qsdp_policy: str | None = None
    """Bits by parameter name, PATTERN=BITS or PATTERN=WEIGHT/GRADIENT with commas between.
    The first shell-style pattern that matches wins, as in "blocks.0.*=8,*.attn.*=8/4".
    """

    qsdp_budget: float | None = None
    """Bits a coded value at most on average, metadata included.
    2 to 8 bits are given to each parameter so that the squared error, measured in the first
    step after a warm-up, is least. Without --qsdp-bits that step travels at 8 bits. Bits given
    by --qsdp-policy or --qsdp-embedding-bits stay and count; the other parameters share the
    rest. A run that resumes with another budget, or with other bits, measures anew.
    """

    qsdp_grad_budget: float | None = None
    """--qsdp-budget of gradients alone: weights keep their bits.
    Without bits of gradients the step that is measured sends them at 8 bits.
    """

    qsdp_warmup_steps: int | None = None
    """First steps that travel with at least --qsdp-warmup-bits.
    Where a method takes two passes a step, each counts.
    """

    qsdp_warmup_bits: int | None = None
    """Least bits a value during --qsdp-warmup-steps. Unset: 32, full precision."""

    qsdp_gather: str | None = None
    """twice: the backward pass gathers the weights again; once: it does not. Unset: twice.
    With once, what the forward pass gathered is kept, packed, until the backward pass. delta:
    every rank keeps the whole model, packed, on grids that last for many steps, and only codes
    that changed are sent. A method's second passes, and warm-up steps, send whole weights, as
    once does.
    """

    qsdp_delta_room: float | None = None
    """Room on both sides of a grid that is kept, as a part of its range: above 0, at most 1.
    With more, fewer weights leave their grids, which are coarser. Unset: 0.25.
    """

    qsdp_delta_redraw_every: int | None = None
    """Steps for which a grid is kept, unless weights leave it before. Unset: 200."""

    qsdp_delta_codes: str | None = None
    """Where the codes that are kept lie. Unset: rank.
    rank: on every rank those of the whole model; node: the ranks of a node keep them between them
    and gather them from each other, inside the node, in each forward and backward pass.
    """

    qsdp_reduce: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"{_REDUCE}. All are flat unless there are several nodes of several ranks each. "
            "Unset: auto."
        ),
    ] = None

    qsdp_ranks_per_node: int | None = None
    """Ranks of one node, consecutive ones. Unset: as the launcher says."""

    qsdp_errors: bool = False
    """At each validation, also measure each parameter's relative error on the wire, for errors.png.
    Its gradient's too; metrics.jsonl has both.
    """

    def config(self, seed: int) -> QSDPConfig | None:
        """What crosses the wire; None for stock FSDP2, and for ``auto``, of which nobody knows yet.

        Raises ValueError, naming the flag, for a value that is not allowed, and for a flag that
        would have no effect beside the others.
        """
        if self.qsdp_bits == AUTO:
            self._check_auto()
            return None
        for name in _BITS:
            if getattr(self, name) is not None:
                check_config_bits(flag(name), getattr(self, name))
        both, weights, grads = (getattr(self, name) for name in _BITS)
        if both is None and grads is None and self.qsdp_grad_budget is not None:
            grads = 8
        is_given = any(bits is not None for bits in (both, weights, grads))
        fallback = both if both is not None else 32 if is_given else 8
        settings = {name.removeprefix("qsdp_"): value for name, value in self._details().items()}
        settings.pop("errors", None)
        if None not in (both, weights, grads):
            raise ValueError(
                f"--qsdp-bits is {both} beside --qsdp-weight-bits {weights} and --qsdp-grad-bits "
                f"{grads}, which leave it nothing to set: leave it out."
            )
        if not is_given and self.qsdp_budget is None:
            for name in self._details():
                raise ValueError(
                    f"{flag(name)} is given without --qsdp-bits, and stock FSDP2 would not heed "
                    "it: add bits (of weights, gradients or both) or a budget, or leave it out."
                )
            return None
        if self.qsdp_policy is not None:
            settings["policy"] = parse_policy(self.qsdp_policy)
        try:
            config = QSDPConfig(
                weight_bits=fallback if weights is None else weights,
                grad_bits=fallback if grads is None else grads,
                seed=seed,
                **settings,
            )
        except ValueError as error:
            raise ValueError(_with_flags(error)) from None
        if self.qsdp_errors and not config.has_codes:
            raise ValueError(
                "--qsdp-errors is for values of 8 bits or fewer, but there are none: choose other "
                "bits, or leave it out."
            )
        return config

    def folder_parts(self, seed: int) -> list[str]:
        """What sets a run with this wire apart, as parts of the name of its folder."""
        wire = self.config(seed)
        if wire is None:
            return [AUTO if self.qsdp_bits == AUTO else "fsdp2"]
        parts = [f"w{wire.weight_bits}g{wire.grad_bits}"]
        for name, value in self._details().items():
            short = name.removeprefix("qsdp_").replace("_", "")
            if name == "qsdp_policy":
                parts.append(short + blake2b(value.encode(), digest_size=4).hexdigest())
            elif isinstance(value, tuple):
                parts.append(short + "+".join(map(str, value)))
            elif name != "qsdp_errors":
                parts.append(value if isinstance(value, str) else f"{short}{value}")
        return parts

    def _details(self) -> dict[str, Any]:
        """The flags that were given, those of bits for all parameters left out."""
        return {
            name: value
            for name, value in self.values().items()
            if value is not None and value is not False and name not in _BITS
        }

    def _check_auto(self) -> None:
        others = [name for name in BITS_OF_ONE_DIRECTION if getattr(self, name) is not None]
        for name in [*others, *self._details()]:
            raise ValueError(
                f"{flag(name)} is given beside --qsdp-bits {AUTO}, which decides on all of the "
                "wire: give bits, or leave it out."
            )

    def check_steps(self, num_passes: int) -> None:
        """Raise ValueError for what would be due after the last of ``num_passes``."""
        wire = self.config(0)
        if wire is None:
            return
        if wire.has_budget and wire.warmup_steps >= num_passes:
            name = flag("qsdp_grad_budget" if wire.budget is None else "qsdp_budget")
            raise ValueError(
                f"{name} is allotted after a warm-up of {wire.warmup_steps} steps, but the "
                f"run takes {num_passes}: shorten --qsdp-warmup-steps, or leave the budget out."
            )
        if self.qsdp_level_steps is not None and min(wire.learning_steps) >= num_passes:
            raise ValueError(
                f"--qsdp-level-steps begins with {min(wire.learning_steps)}, but the run takes "
                f"{num_passes}: give earlier ones, or leave it out."
            )


def _with_flags(error: ValueError) -> str:
    """A message of ``QSDPConfig``, which begins with a field's name, for the command line."""
    first, _, rest = quoted(error).partition(" ")
    name, _, value = first.replace("'", "").partition("=")
    names = "|".join(each.name for each in fields(QSDPConfig))
    rest = re.sub(
        rf"\b({names})='?([\w-]+)'?", lambda found: f"{flag('qsdp_' + found[1])} {found[2]}", rest
    )
    return f"{' '.join(filter(None, (flag('qsdp_' + name), value, rest)))}."


def parse_policy(text: str) -> Policy:
    """``QSDPConfig.policy`` from PATTERN=BITS or PATTERN=WEIGHT/GRADIENT, with commas between."""
    policy: list[tuple[str, int | tuple[int, int]]] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\S+)=([0-9]{1,3})(?:/([0-9]{1,3}))?\s*", part)
        if found is None:
            raise ValueError(
                f"--qsdp-policy holds {part!r}: give PATTERN=BITS or PATTERN=WEIGHT/GRADIENT, with "
                "commas between."
            )
        pattern, weight, grad = found.groups()
        policy.append((pattern, int(weight) if grad is None else (int(weight), int(grad))))
    return tuple(policy)
