"""The flags of the training methods, and the targets and schedules that they come to. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.gmp.schedule import GMPSchedule
from qsdp.sparsity.compression_target import Compression
from qsdp.train.wire_flags import flag

METHODS = {"cram": "CrAM", "acdc": "AC/DC", "gmp": "GMP", "sam": "SAM"}
"""By flag; none of them is plain AdamW."""
INSTEAD = {"cram_sparsity": "cram_targets", "acdc_sparsity": "acdc_target"}
"""Flags that nothing heeds beside another, which says the same in place of it."""


@dataclass(frozen=True, kw_only=True)
class MethodFlags:
    """How the optimizer prepares the model for compression; one method at most."""

    cram: bool = False
    """Train with CrAM+ (two passes a step), which makes the model prunable in one shot."""

    cram_sparsity: tuple[float, ...] = (0.5, 0.7, 0.9)
    """Sparsities, one of which is drawn each step: a list with commas, each from 0 to below 1."""

    cram_targets: tuple[str, ...] | None = None
    """What is drawn from in place of --cram-sparsity, with commas between: fractions (0.7), N:M
    patterns (2:4,4:8), bits (4bit); `+` joins terms, `layer` makes each matrix lose the same,
    `block4` prunes 4 weights together (2:4+4bit, 0.7+layer, 0.5+block4)."""

    cram_rho: float = 0.05
    """Length of CrAM's ascent step, in gradients."""

    cram_normalize: bool = False
    """Ascend by --cram-rho, above 0, along the gradient's direction, whatever its norm, as SAM
    does."""

    cram_plus: bool = True
    """Add the dense gradient to the compressed model's; --no-cram-plus is CrAM without it."""

    cram_sparse_grad: bool = True
    """Mask the compressed model's gradient as its weights are, where targets prune."""

    acdc: bool = False
    """Train with AC/DC: compressed and dense phases alternate, and the model ends sparse; its dense
    twin is kept in OUT/dense-twin."""

    acdc_sparsity: float = 0.9
    """Fraction of the prunable weights that AC/DC's compressed phases prune."""

    acdc_target: str | None = None
    """What they prune to in place of --acdc-sparsity: 2:4, 0.9+layer, 0.8+block4."""

    acdc_warmup: int | None = None
    """Dense steps before the first compressed phase. Unset: 10 % of --steps."""

    acdc_phase: int | None = None
    """Steps a phase, where there are phases between the warm-up and the last two. Unset: 5 % of
    --steps."""

    acdc_last_dense: int | None = None
    """Steps of the last dense phase. Unset: 10 % of --steps."""

    acdc_last_sparse: int | None = None
    """Steps of the last compressed phase. Unset: 15 % of --steps."""

    gmp: bool = False
    """Train with gradual magnitude pruning: ever more weights are pruned, by a cubic schedule, and
    the learning rate starts anew each time."""

    gmp_sparsity: float = 0.9
    """Fraction of the prunable weights pruned in the end."""

    gmp_initial: float | None = None
    """Fraction pruned at first, at most --gmp-sparsity, where there are several prunings. Unset:
    0.5, or --gmp-sparsity if that is less."""

    gmp_start: int | None = None
    """Steps before the first pruning. Unset: 10 % of --steps."""

    gmp_every: int | None = None
    """Steps between prunings. Unset: 5 % of --steps."""

    gmp_end: int | None = None
    """The step of the last pruning at the latest. Unset: 75 % of --steps."""

    sam: bool = False
    """Train with SAM, sharpness-aware minimization (two passes a step)."""

    sam_rho: float = 0.05
    """Length of SAM's ascent step, whatever the gradient's norm."""

    prunable: str | None = None
    """Shell-style patterns of the parameters that may be pruned, with commas between, for a method
    that prunes or --one-shot. Unset: the weights of linear layers inside the blocks."""

    @property
    def method(self) -> str:
        """`AdamW`, or the name of the method around it."""
        return METHODS.get(self.method_flag, "AdamW")

    @property
    def method_flag(self) -> str:
        """`cram`, `acdc`, `gmp`, `sam`, or empty."""
        return next((flag for flag in METHODS if getattr(self, flag)), "")

    @property
    def method_parts(self) -> list[str]:
        """What sets a run with this method apart, as parts of the name of its folder."""
        if not self.method_flag:
            return []
        details = {
            "cram": "" if self.cram_targets is None else "+".join(map(str, self.targets)),
            "acdc": str(self.acdc_compression),
            "gmp": f"{self.gmp_sparsity:g}",
            "sam": "",
        }
        return [self.method_flag + details[self.method_flag].replace(":", "of")]

    @property
    def passes(self) -> int:
        """Forward and backward passes a step."""
        return 2 if self.cram or self.sam else 1

    @property
    def targets(self) -> tuple[Compression, ...]:
        """What CrAM draws from."""
        return tuple(Compression.of(target) for target in self.cram_targets or self.cram_sparsity)

    @property
    def acdc_compression(self) -> Compression:
        """What AC/DC's compressed phases keep."""
        return Compression.of(self.acdc_target or self.acdc_sparsity)

    @property
    def patterns(self) -> list[str] | None:
        """Of the prunable set."""
        return None if self.prunable is None else self.prunable.split(",")

    def acdc_schedule(self, steps: int) -> ACDCSchedule:
        """AC/DC's phases in a run of ``steps``."""
        return ACDCSchedule.of(
            steps, self.acdc_warmup, self.acdc_phase, self.acdc_last_dense, self.acdc_last_sparse
        )

    def gmp_schedule(self, steps: int) -> GMPSchedule:
        """When gradual pruning prunes in a run of ``steps``."""
        return GMPSchedule.of(
            steps,
            self.gmp_sparsity,
            self.gmp_initial,
            self.gmp_start,
            self.gmp_every,
            self.gmp_end,
        )

    def mask_schedule(self, steps: int) -> ACDCSchedule | GMPSchedule | None:
        """When masks change in a run of ``steps``; None where there are none."""
        if self.acdc:
            return self.acdc_schedule(steps)
        return self.gmp_schedule(steps) if self.gmp else None

    def check_method(self, steps: int) -> None:
        """Raise ValueError, naming the flag, for what no run of ``steps`` can have."""
        chosen = [flag for flag in METHODS if getattr(self, flag)]
        if len(chosen) > 1:
            raise ValueError(f"--{chosen[0]} and --{chosen[1]} are both given; choose one method.")
        given = [f.name for f in fields(MethodFlags) if getattr(self, f.name) != f.default]
        for name in given:
            if getattr(self, name) in ("", ()):
                raise ValueError(f"{flag(name)} is empty; give a value, or leave it out.")
        for name, make in (
            ("--cram-targets", lambda: self.targets),
            ("--acdc-target", lambda: self.acdc_compression),
            (f"--{self.method_flag}", lambda: self.mask_schedule(steps)),
        ):
            try:
                make()
            except ValueError as error:
                raise ValueError(f"{name}: {error}.") from None
        self.check_all_are_used(given)
        if self.acdc and self.acdc_compression.bits is not None:
            raise ValueError(
                f"--acdc-target is {self.acdc_target!r}; AC/DC prunes: leave bits out."
            )
        if self.acdc and self.acdc_schedule(steps).is_compressed(0):
            raise ValueError("--acdc-warmup is 0; AC/DC begins dense: choose 1 step or more.")

    @property
    def prunes(self) -> bool:
        """Whether the method compresses weights."""
        return self.cram or self.acdc or self.gmp

    def check_all_are_used(self, given: Iterable[str]) -> None:
        """Raise ValueError if of the fields ``given`` one belongs to a method that is not chosen,
        or has no effect beside others: also where it is given as it is by default."""
        for name in given:
            method, other = name.partition("_")[0], INSTEAD.get(name)
            if name != method and method in METHODS and not getattr(self, method):
                raise ValueError(
                    f"{self._given(name)} is given without --{method}, so that nothing would heed "
                    "it; add that, or leave it out."
                )
            if other is not None and getattr(self, other) is not None:
                raise ValueError(
                    f"{flag(name)} is given beside {flag(other)}, which stands in place of it; "
                    "leave one of the two out."
                )
            if name == "cram_sparse_grad" and not any(t.fraction for t in self.targets):
                raise ValueError(
                    f"{self._given(name)} is for targets that prune, but "
                    f"{' and '.join(map(str, self.targets))} masks nothing; give another target, "
                    "or leave it out."
                )
            if name == "cram_normalize" and not self.cram_rho:
                raise ValueError(
                    f"{self._given(name)} is for an ascent step, but --cram-rho is 0; give a "
                    "larger one, or leave it out."
                )

    def _given(self, name: str) -> str:
        """The flag that gave a field its value."""
        return f"--{'no-' if getattr(self, name) is False else ''}{flag(name)[2:]}"
