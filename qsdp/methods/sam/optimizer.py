"""SAM: sharpness-aware minimization (Foret et al., ICLR 2021, arXiv 2010.01412)."""

from __future__ import annotations

import torch
from torch import nn

from qsdp.methods.construct_on_all_ranks import reject_unknown_arguments
from qsdp.methods.cram.optimizer import CrAM


class SAM(CrAM):
    """Sharpness-aware minimization (Foret et al., ICLR 2021, arXiv 2010.01412).

    The gradient is that at w + rho * g / |g|, without compression. The baseline of CrAM, by the
    same code.
    """

    @reject_unknown_arguments
    def __init__(
        self,
        model: nn.Module,
        base_optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        max_norm: float | None = None,
    ) -> None:
        """Wrap ``base_optimizer``, made of the parameters of ``model``.

        Args:
            model, base_optimizer, max_norm: As for ``CrAM``; nothing need be prunable.
            rho: Length of the ascent step, at least 0, whatever the gradient's norm.

        Raises:
            ValueError: A value is out of range, or the optimizer has no
                parameter of the model.
            RuntimeError: Ranks that share the model give other values.
        """
        super().__init__(
            model,
            base_optimizer,
            sparsity=0.0,
            rho=rho,
            plus=False,
            normalize=True,
            max_norm=max_norm,
            prunable=(),
        )
