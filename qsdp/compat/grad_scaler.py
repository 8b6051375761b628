"""What a GradScaler has done with gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.amp.grad_scaler import OptState


def has_unscaled(scaler: torch.amp.GradScaler, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Whether ``scaler`` has unscaled the gradients of one of ``optimizers`` since its update."""
    if not scaler.is_enabled():
        return False
    states = [scaler._per_optimizer_states.get(id(optimizer)) for optimizer in optimizers]
    return any(state is not None and state["stage"] != OptState.READY for state in states)
