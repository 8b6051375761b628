"""Passes that an exception has interrupted: FSDP2 is in the middle of one, and is reset."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qsdp.compat.fsdp_state import (
    fsdp_roots,
    is_root,
    param_groups_of,
    state_of,
    with_enclosing_roots,
)
from qsdp.compat.installed_wire import passes_of


def abandon_pass(model: nn.Module) -> None:
    """Make FSDP2 forget an interrupted forward or backward pass, cut short by an exception.

    Weights that stayed gathered are freed, or the next pass would not see an edit of the shards,
    and gradients that were not reduced are dropped. The public ``reset_iter_state`` does most of it
    since torch 2.13. Does nothing where FSDP2 is not used.
    """
    for passes in passes_of(model):
        passes.abandon_what_is_late()
    for root in fsdp_roots(model):
        state = state_of(root)
        if not state._is_root:  # no pass was begun, or it is a part: only a whole can be reset
            continue
        if hasattr(root, "reset_iter_state"):
            root.reset_iter_state()
        else:
            _reset_iteration(state)
        for group in (group for s in state._state_ctx.all_states for group in param_groups_of(s)):
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None


def abandon_interrupted_backward(module: nn.Module) -> None:
    """Call ``abandon_pass`` where ``module`` is a root whose last backward pass has not ended.

    To be called outside a backward pass.
    """
    if is_root(module) and state_of(module)._state_ctx.post_backward_final_callback_queued:
        abandon_pass(module)


def abandon_passes(model: nn.Module) -> None:
    """Make FSDP2 forget interrupted passes of ``model``, and of a root around it."""
    for whole in with_enclosing_roots(model):
        abandon_pass(whole)


def abandon_interrupted_pass(model: nn.Module) -> None:
    """Call ``abandon_pass`` where FSDP2 is in an interrupted pass; none may be under way."""
    for root in fsdp_roots(model):
        context = state_of(root)._state_ctx
        if context.post_backward_final_callback_queued or any(
            state._training_state is not type(state._training_state).IDLE
            # One call to ``fully_shard`` for several modules waits for all of them.
            and not (len(state._modules) > 1 and state._modules_to_run_forward)
            for state in context.all_states
        ):
            abandon_pass(root)


def _reset_iteration(state: Any) -> None:
    """Do what ``reset_iter_state`` does, on the fields of torch 2.11."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    state._comm_ctx.all_gather_state = None
    state._comm_ctx.reduce_scatter_state = None
    state._comm_ctx.post_forward_order.clear()
    for member in state._state_ctx.all_states:
        idle = type(member._training_state).IDLE
        member._training_state = idle
        member._modules_to_run_forward.clear()
        for group in param_groups_of(member):
            if group._all_gather_result is not None:
                work = group._all_gather_result.all_gather_work
                if isinstance(work, dist.Work):
                    work.wait()
                group._all_gather_result = None
            group._post_reduce_event = None
            group._all_reduce_state = None
            group._reshard_after_forward_event = None
            group._partial_reduce_output = None
            group._post_forward_indices.clear()
            group._training_state = idle
            group._to_sharded()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False
