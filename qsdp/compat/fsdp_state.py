"""FSDP2's state of a module: its parameter groups, and what it takes for the root of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def state_of(module: Any) -> Any:
    """FSDP2's state of ``module``, on which ``fully_shard`` was called."""
    return module._get_fsdp_state()


def param_groups_of(state: Any) -> list[Any]:
    """The parameter groups of an FSDP2 ``state``: more than one with per-parameter meshes."""
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13
    if groups is not None:
        return list(groups)
    group = state._fsdp_param_group  # torch 2.11
    return [] if group is None else [group]


def fsdp_roots(module: nn.Module) -> Iterator[Any]:
    """The outermost FSDP modules in ``module``, itself among them."""
    if isinstance(module, FSDPModule):
        yield module
    else:
        for child in module.children():
            yield from fsdp_roots(child)


def is_root(module: nn.Module) -> bool:
    """Whether FSDP2 takes a forward pass of ``module`` for one of the whole model."""
    return state_of(module)._is_root is True


def becomes_root(module: nn.Module) -> bool:
    """Whether FSDP2's state will take ``module`` for a root: ``is_root``, before a pass begins.

    The first pass decides.
    """
    state = state_of(module)
    if state._is_root is None:
        state._lazy_init()
    return is_root(module)


def stays_gathered_by_default(module: nn.Module) -> bool:
    """Whether FSDP2's state of a root says that weights stay gathered after its forward pass.

    They do so for a backward pass that follows at once.
    """
    return bool(state_of(module)._auto_reshard_after_forward)


def all_states(root: nn.Module) -> list[Any]:
    """FSDP2's states of all groups that it has for a pass through ``root``, since its first."""
    return list(state_of(root)._state_ctx.all_states)


def with_enclosing_roots(model: nn.Module) -> list[nn.Module]:
    """``model``, and the FSDP2 roots outside of it whose state it is a part of.

    These are known since their first pass: their groups may hold parameters of ``model``.
    """
    found = {id(model): model}
    for part in fsdp_roots(model):
        for state in state_of(part)._state_ctx.all_states:
            if state._is_root and not state_of(part)._is_root:
                found[id(state._modules[0])] = state._modules[0]
    return list(found.values())
