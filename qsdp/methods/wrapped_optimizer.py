"""Optimizers that Accelerate and Lightning have wrapped are seen through to the one that steps."""

from __future__ import annotations

from typing import Any

import torch

_WRAPPERS = {"AcceleratedOptimizer", "_FabricOptimizer", "LightningOptimizer"}


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of those that only pass on what they are asked: their ``.optimizer``.

    Raises ValueError where one scales gradients, which would not be unscaled beside it.
    """
    while _is_wrapper(optimizer):
        strategy = getattr(optimizer, "_strategy", None)
        holders = (optimizer, getattr(strategy, "precision", None))
        if any(getattr(holder, "scaler", None) is not None for holder in holders):
            raise ValueError(
                f"the base optimizer is a {type(optimizer).__name__} whose gradients a GradScaler "
                "scales: wrap the optimizer before that prepares it."
            )
        optimizer = optimizer.optimizer
    return optimizer


def put_inside(prepared: Any, optimizer: torch.optim.Optimizer) -> None:
    """Let Accelerate's ``prepared`` pass on to ``optimizer``, which wraps the one inside it."""
    prepared.optimizer = optimizer
    # With a GradScaler it calls the step that it has bound as it was made.
    prepared.__setstate__(prepared.__getstate__())


def leaves_steps_out(optimizer: Any) -> bool:
    """Whether ``optimizer``, a wrapped one, would leave a step out now: Accelerate accumulates."""
    state = getattr(optimizer, "gradient_state", None)
    return state is not None and _is_wrapper(optimizer) and not state.sync_gradients


def _is_wrapper(optimizer: Any) -> bool:
    # By name, so that the libraries need not be installed. Others of that form may do more.
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    inner = getattr(optimizer, "optimizer", None)
    return bool(names & _WRAPPERS) and isinstance(inner, torch.optim.Optimizer)


def wrapped_by(optimizer: Any) -> Any:
    """The optimizer that a wrapper passes on what it is asked to; itself where this is none.

    Fabric and Lightning give their wrappers the class of what is inside: methods that set
    attributes must do so there.
    """
    return optimizer.optimizer if _is_wrapper(optimizer) else optimizer
