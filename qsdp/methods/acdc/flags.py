"""The flags of AC/DC. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qsdp.common.user_errors import quoted
from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.method import Companion, Method, MethodRun, RunSettings
from qsdp.sparsity.compression_target import Compression

if TYPE_CHECKING:
    import torch
    from torch import nn

DENSE_TWIN = "dense-twin"


@dataclass(frozen=True, kw_only=True)
class ACDCFlags(Method):
    """AC/DC: the model ends sparse, beside a dense twin."""

    KEY = "acdc"
    NAME = "AC/DC"
    PRUNES = True
    IS_TIMED_BY_VALIDATION = True  # the twin is the best that a validation has seen
    INSTEAD: ClassVar = {"acdc_sparsity": "acdc_target"}
    OF_THE_SCHEDULE = ("acdc_warmup", "acdc_phase", "acdc_last_dense", "acdc_last_sparse")
    FOLDERS = (DENSE_TWIN,)
    IS_IN_EVERY_IDENTITY = True

    acdc: bool = False
    """Train with AC/DC: compressed and dense phases alternate, and the model ends sparse.
    Its dense twin is kept in OUT/dense-twin.
    """

    acdc_sparsity: float = 0.9
    """Fraction of the prunable weights that AC/DC's compressed phases prune."""

    acdc_target: str | None = None
    """What they prune to in place of --acdc-sparsity: 2:4, 0.9+layer, 0.8+block4."""

    acdc_warmup: int | None = None
    """Dense steps before the first compressed phase. Unset: 10 % of --steps."""

    acdc_phase: int | None = None
    """Steps a phase, where there are phases between warm-up and last two. Unset: 5 % of --steps."""

    acdc_last_dense: int | None = None
    """Steps of the last dense phase. Unset: 10 % of --steps."""

    acdc_last_sparse: int | None = None
    """Steps of the last compressed phase. Unset: 15 % of --steps."""

    @property
    def target(self) -> Compression:
        """What the compressed phases keep."""
        return Compression.of(self.acdc_target or self.acdc_sparsity)

    @property
    def details(self) -> str:
        """The target of the compressed phases."""
        return str(self.target)

    def schedule(self, steps: int) -> ACDCSchedule:
        """When AC/DC compresses in a run of ``steps``."""
        return ACDCSchedule.of(
            steps, self.acdc_warmup, self.acdc_phase, self.acdc_last_dense, self.acdc_last_sparse
        )

    def identity(self) -> dict[str, Any]:
        """The settings that change a run's numbers, the target in one form."""
        settings = super().identity()
        if self.is_chosen:  # what was given in two ways may be the same
            settings["acdc_target"] = str(self.target)
            del settings["acdc_sparsity"]
        return settings

    def check_values(self) -> None:
        """Raise ValueError for a sparsity or target that cannot be."""
        is_fraction = 0 <= self.acdc_sparsity < 1
        self.require("acdc_sparsity", is_fraction, "choose a fraction from 0 to below 1")
        try:
            _ = self.target
        except ValueError as error:
            raise ValueError(f"--acdc-target: {quoted(error)}.") from None

    def check_run(self, steps: int) -> None:
        """Raise ValueError unless phases fit into ``steps``, and the target only prunes."""
        try:
            schedule = self.schedule(steps)
        except ValueError as error:
            raise ValueError(f"--acdc: {quoted(error)}.") from None
        if self.target.bits is not None:
            raise ValueError(
                f"--acdc-target is {self.acdc_target!r}, but AC/DC only prunes: leave bits out."
            )
        if schedule.is_compressed(0):
            raise ValueError("--acdc-warmup is 0, but AC/DC begins dense: choose 1 step or more.")

    def wrap(
        self, model: nn.Module, base: torch.optim.Optimizer, settings: RunSettings
    ) -> torch.optim.Optimizer:
        """AC/DC around ``base``."""
        from qsdp.methods.acdc.optimizer import ACDC

        return ACDC(
            model,
            base,
            schedule=self.schedule(settings.steps),
            target=self.target,
            max_norm=settings.max_norm,
            prunable=settings.prunable,
        )

    def companion(self, run: MethodRun) -> Companion:
        """What keeps the dense twin."""
        from qsdp.methods.acdc.twin import DenseTwin

        return DenseTwin(run, run.kept_model(DENSE_TWIN))


METHOD = ACDCFlags
