"""The state dicts of model and optimizer that a checkpoint is written from and read into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)

from qsdp.compat.parameter_names import checkpoint_names

TENSORS = "tensors"
"""The part of a checkpoint that further tensors are in, beside "model" and "optimizer"."""


def state_to_save(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The state dict to save of model, optimizer and further ``tensors``.

    It holds the tensors themselves, by clean names.
    """
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        with _seen_by_dcp(optimizer):
            state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    state = renamed_state(state, checkpoint_names(model))
    return state | ({TENSORS: dict(tensors)} if tensors else {})


def checked_tensors(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Further tensors of a checkpoint by name; an empty dict for None.

    Raises ValueError for what are no tensors by name.
    """
    given = {} if tensors is None else tensors
    is_right = isinstance(given, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in given.items()
    )
    if not is_right:
        raise ValueError(f"tensors is {shown(tensors)}: give tensors by name.")
    return dict(given)


@contextlib.contextmanager
def _seen_by_dcp(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, DCP finds a state to be there, which it would fill by a step that counts."""
    state: Any = optimizer.state
    empty = [] if state else [p for group in optimizer.param_groups for p in group["params"]]
    state.update((parameter, {}) for parameter in empty)
    try:
        yield
    finally:
        for parameter in empty:
            state.pop(parameter, None)


def renamed_state(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same state dict by other names: DCP leaves the names of some wrappers in."""

    def by_name(values: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in values.items()}

    found = {"model": by_name(state["model"])}
    if "optimizer" in state:
        groups = [
            {**group, "params": [names.get(name, name) for name in group["params"]]}
            for group in state["optimizer"]["param_groups"]
        ]
        of_each = by_name(state["optimizer"]["state"])
        found["optimizer"] = {**state["optimizer"], "state": of_each, "param_groups": groups}
    return found
