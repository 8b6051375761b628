"""The flags of CrAM. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qsdp.common.user_errors import quoted
from qsdp.methods.method import Method, RunSettings
from qsdp.sparsity.compression_target import Compression

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class CrAMFlags(Method):
    """CrAM, which makes the model prunable in one shot."""

    KEY = "cram"
    NAME = "CrAM"
    PASSES = 2
    PRUNES = True
    INSTEAD: ClassVar = {"cram_sparsity": "cram_targets"}
    IS_IN_EVERY_IDENTITY = True

    cram: bool = False
    """Train with CrAM+ (two passes a step), which makes the model prunable in one shot."""

    cram_sparsity: tuple[float, ...] = (0.5, 0.7, 0.9)
    """Sparsities, one of which is drawn each step: a list with commas, each from 0 to below 1."""

    cram_targets: tuple[str, ...] | None = None
    """What is drawn from in place of --cram-sparsity, with commas between.
    Fractions (0.7), N:M patterns (2:4,4:8) or bits (4bit); + joins terms, layer makes each
    matrix lose the same, block4 prunes 4 weights together (2:4+4bit, 0.7+layer, 0.5+block4).
    """

    cram_rho: float = 0.05
    """Length of CrAM's ascent step, in gradients."""

    cram_normalize: bool = False
    """Ascend by --cram-rho, above 0, along the gradient's direction, whatever its norm: as SAM."""

    cram_plus: bool = True
    """Add the dense gradient to the compressed model's, and clip at twice --clip-grad.
    --no-cram-plus is CrAM without it.
    """

    cram_sparse_grad: bool = True
    """Mask the compressed model's gradient as its weights are, where targets prune."""

    @property
    def title(self) -> str:
        """CrAM, or CrAM+."""
        return self.NAME + "+" * self.cram_plus

    @property
    def targets(self) -> tuple[Compression, ...]:
        """What is drawn from."""
        return tuple(Compression.of(target) for target in self.cram_targets or self.cram_sparsity)

    @property
    def details(self) -> str:
        """The targets, where they are not sparsities."""
        return "" if self.cram_targets is None else "+".join(map(str, self.targets))

    def identity(self) -> dict[str, Any]:
        """The settings that change a run's numbers, the targets in one form."""
        settings = super().identity()
        if self.is_chosen:  # what was given in two ways may be the same
            settings["cram_targets"] = [str(target) for target in self.targets]
            del settings["cram_sparsity"]
        return settings

    def check_values(self) -> None:
        """Raise ValueError for a radius, sparsity or target that cannot be."""
        self.require("cram_rho", 0 <= self.cram_rho < math.inf, "choose a number from 0")
        self.require(
            "cram_sparsity",
            bool(self.cram_sparsity) and all(0 <= s < 1 for s in self.cram_sparsity),
            "give numbers from 0 to below 1, with commas between",
        )
        try:
            _ = self.targets
        except ValueError as error:
            raise ValueError(f"--cram-targets: {quoted(error)}.") from None

    def company(self, name: str) -> str | None:
        """What the field ``name`` needs that is not there, and what to do."""
        if name == "cram_sparse_grad" and not any(t.fraction for t in self.targets):
            return (
                f"targets that prune, but {' and '.join(map(str, self.targets))} masks nothing: "
                "give another target"
            )
        if name == "cram_normalize" and not self.cram_rho:
            return "an ascent step, but --cram-rho is 0: give a larger one"
        return None

    def wrap(
        self, model: nn.Module, base: torch.optim.Optimizer, settings: RunSettings
    ) -> torch.optim.Optimizer:
        """CrAM around ``base``."""
        from qsdp.methods.cram.optimizer import CrAM

        return CrAM(
            model,
            base,
            sparsity=self.targets,
            rho=self.cram_rho,
            plus=self.cram_plus,
            normalize=self.cram_normalize,
            sparse_grad=self.cram_sparse_grad,
            max_norm=settings.max_norm,
            prunable=settings.prunable,
            seed=settings.seed,
        )


METHOD = CrAMFlags
