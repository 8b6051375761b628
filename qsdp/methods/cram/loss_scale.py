"""What the losses of a step are multiplied by, so that gradients in fp16 do not vanish."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from qsdp.compat.grad_scaler import has_unscaled

LossScale = float | torch.amp.GradScaler | None


def loss_scale(scale: LossScale) -> float | str:
    """The factor that ``scale`` is; what can be none, in words."""
    if isinstance(scale, torch.amp.GradScaler):
        return scale.get_scale()
    if scale is None:
        return 1.0
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    return float(scale) if is_number else repr(scale)


def check_loss_scale(
    scale: LossScale, factor: float | str, optimizers: Iterable[torch.optim.Optimizer]
) -> None:
    """Check what gradients of ``optimizers`` were scaled by: ``scale``, which is ``factor``.

    Raises:
        ValueError: It is no number above 0 and no GradScaler.
        RuntimeError: The GradScaler has unscaled them already.
    """
    if isinstance(factor, str) or not 0 < factor < math.inf:
        raise ValueError(f"scale is {factor}: give a number above 0, or a torch.amp.GradScaler.")
    if isinstance(scale, torch.amp.GradScaler) and has_unscaled(scale, optimizers):
        raise RuntimeError(
            "the gradients of the first pass are unscaled already, and those of the second would "
            "not be: call scaler.unscale_ after second_pass()."
        )
