"""Freeing gathered weights, so that modules show their shards again, and the next pass them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from qsdp.compat.fsdp_state import param_groups_of, state_of, with_enclosing_roots
from qsdp.compat.parameter_group import parameter_groups


def reshards_after_backward(model: nn.Module) -> bool:
    """Whether resharding of every group of ``model`` follows its backward pass.

    True for a model without FSDP: there is nothing that could go stale.
    """
    return all(
        group.reshard_after_backward
        for parameters in parameter_groups(model)
        for group in param_groups_of(parameters.state)
    )


def reshard(model: nn.Module) -> None:
    """Free every gathered weight of ``model``, and autocast's copies of weights.

    A group that stays gathered after a forward pass (the root does) would hide its shards from
    ``model.parameters()``, and the next forward pass would not see an edit of them; nor would one
    whose gather is under way, since FSDP2 takes that for the next forward pass. Nor would one in
    the same region of ``torch.autocast``, sharded or not: that keeps what it has cast.
    """
    torch.clear_autocast_cache()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            reshard_module(module)


def reshard_all(model: nn.Module) -> None:
    """Free what is gathered, as ``reshard`` does, of ``model`` and of an FSDP2 root around it."""
    for whole in with_enclosing_roots(model):
        reshard(whole)


def reshard_module(module: Any) -> None:
    """Free the gathered weights of the group of ``module`` alone, as ``reshard`` does."""
    if any(group._all_gather_result is not None for group in param_groups_of(state_of(module))):
        module.unshard()
    module.reshard()
