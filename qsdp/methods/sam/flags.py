"""The flags of SAM. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qsdp.methods.method import Method, RunSettings

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class SAMFlags(Method):
    """SAM, sharpness-aware minimization."""

    KEY = "sam"
    NAME = "SAM"
    PASSES = 2
    IS_IN_EVERY_IDENTITY = True

    sam: bool = False
    """Train with SAM, sharpness-aware minimization (two passes a step)."""

    sam_rho: float = 0.05
    """Length of SAM's ascent step, whatever the gradient's norm."""

    def check_values(self) -> None:
        """Raise ValueError for a radius that cannot be."""
        self.require("sam_rho", 0 <= self.sam_rho < math.inf, "choose a number from 0")

    def wrap(
        self, model: nn.Module, base: torch.optim.Optimizer, settings: RunSettings
    ) -> torch.optim.Optimizer:
        """SAM around ``base``."""
        from qsdp.methods.sam.optimizer import SAM

        return SAM(model, base, rho=self.sam_rho, max_norm=settings.max_norm)


METHOD = SAMFlags
