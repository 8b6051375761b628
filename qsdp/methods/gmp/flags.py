"""The flags of gradual magnitude pruning. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qsdp.common.user_errors import quoted
from qsdp.methods.gmp.schedule import GMPSchedule
from qsdp.methods.method import Method, RunSettings

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class GMPFlags(Method):
    """Gradual magnitude pruning: the model ends sparse."""

    KEY = "gmp"
    NAME = "GMP"
    PRUNES = True
    OF_THE_SCHEDULE = ("gmp_sparsity", "gmp_initial", "gmp_start", "gmp_every", "gmp_end")
    IS_IN_EVERY_IDENTITY = True

    gmp: bool = False
    """Train with gradual magnitude pruning: ever more weights are pruned, by a cubic schedule.
    The learning rate starts anew each time.
    """

    gmp_sparsity: float = 0.9
    """Fraction of the prunable weights pruned in the end."""

    gmp_initial: float | None = None
    """Fraction pruned at first, at most --gmp-sparsity, where there are several prunings.
    Unset: 0.5, or --gmp-sparsity if that is less.
    """

    gmp_start: int | None = None
    """Steps before the first pruning. Unset: 10 % of --steps."""

    gmp_every: int | None = None
    """Steps between prunings. Unset: 5 % of --steps."""

    gmp_end: int | None = None
    """The step of the last pruning at the latest. Unset: 75 % of --steps."""

    @property
    def details(self) -> str:
        """The sparsity at the end."""
        return f"{self.gmp_sparsity:g}"

    def schedule(self, steps: int) -> GMPSchedule:
        """When gradual magnitude pruning prunes in a run of ``steps``."""
        return GMPSchedule.of(
            steps,
            self.gmp_sparsity,
            self.gmp_initial,
            self.gmp_start,
            self.gmp_every,
            self.gmp_end,
        )

    def learning_rate_cycle(self, step: int, steps: int) -> tuple[int, int]:
        """The cycle of the learning rate between two prunings."""
        return self.schedule(steps).cycle(step)

    def check_values(self) -> None:
        """Raise ValueError for a sparsity that cannot be."""
        is_fraction = 0 <= self.gmp_sparsity < 1
        self.require("gmp_sparsity", is_fraction, "choose a fraction from 0 to below 1")

    def check_run(self, steps: int) -> None:
        """Raise ValueError unless prunings fit into ``steps``."""
        try:
            self.schedule(steps)
        except ValueError as error:
            raise ValueError(f"--gmp: {quoted(error)}.") from None

    def wrap(
        self, model: nn.Module, base: torch.optim.Optimizer, settings: RunSettings
    ) -> torch.optim.Optimizer:
        """GMP around ``base``."""
        from qsdp.methods.gmp.optimizer import GMP

        schedule = self.schedule(settings.steps)
        return GMP(
            model,
            base,
            schedule=schedule,
            max_norm=settings.max_norm,
            prunable=settings.prunable,
        )


METHOD = GMPFlags
