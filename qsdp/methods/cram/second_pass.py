"""CrAM's second pass: the weights follow the first gradient up, and are compressed then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsdp.common.bitmask import PackedMask
from qsdp.common.model_structure import unique_tensors
from qsdp.compat.installed_wire import aside
from qsdp.compat.interrupted_passes import abandon_passes
from qsdp.compat.resharding import reshard_all
from qsdp.methods.optimizer_wrapper import SupportCallback
from qsdp.methods.rollback import snapshot_buffers_and_grads
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import local_shard
from qsdp.sparsity.prunable import Prunable
from qsdp.sparsity.prune_and_round import prune_and_round_, prune_by_mask_


def second_pass(
    closure: Callable[[], Any],
    model: nn.Module,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    scale: float,
    prunable: Prunable,
    target: Compression,
    sparse_grad: bool,
    on_support_change: SupportCallback | None,
) -> Any:
    """CrAM's second pass: leave in ``.grad`` the gradient at the compressed point.

    The weights are left as before.

    Args:
        closure: Runs forward and backward.
        model: Its buffers and other gradients stay as they are.
        parameters: Those of the optimizer, each once, with the gradients of the first pass,
            ``grads``.
        scale: The weights move by this times their gradient.
        prunable: What is compressed, to ``target``.
        sparse_grad: Mask the gradient as the weights were.
        on_support_change: Hears of the masks, where there are some, and of their end.

    Returns:
        What the closure returns.
    """
    tell = on_support_change if target.fraction else None
    ascents = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
    edited = unique_tensors([*(p for p, _ in ascents), *prunable.parameters])
    shards = [local_shard(parameter) for parameter in edited]
    before = [shard.values.clone() for shard in shards]
    restore = snapshot_buffers_and_grads(model, parameters)
    with aside(model):
        try:
            # A group that had no backward pass is still gathered, and would hide the edit.
            reshard_all(model)
            for parameter, grad in ascents:
                local_shard(parameter).values.add_(local_shard(grad).values, alpha=scale)
            masks: list[PackedMask] = []
            if target.fraction or target.bits is not None:  # SAM compresses nothing
                masks = prune_and_round_(prunable.shards(), target, prunable.dims)
            if tell is not None:
                tell(_unpacked(prunable.parameters, masks), with_grads=sparse_grad)
            loss = run_pass(closure, parameters)
            if sparse_grad and target.fraction:
                _mask_grads(prunable.parameters, masks)
            return loss
        except BaseException:
            abandon_passes(model)
            raise
        finally:
            # A forward pass without a backward one left weights gathered: the compressed ones.
            reshard_all(model)
            for shard, values in zip(shards, before, strict=True):
                shard.values.copy_(values)
            if tell is not None:
                tell(None)
            restore()


def run_pass(closure: Callable[[], Any], parameters: Sequence[Tensor]) -> Any:
    """Run ``closure``, the first pass or the second, from no gradient, and return its result."""
    for parameter in parameters:
        parameter.grad = None
    with torch.enable_grad():
        return closure()


def _unpacked(
    parameters: Sequence[nn.Parameter], masks: Sequence[PackedMask]
) -> dict[nn.Parameter, Tensor]:
    """The masks at a byte a weight, which no name may hold through a pass."""
    return {p: mask.unpack() for p, mask in zip(parameters, masks, strict=True)}


def _mask_grads(parameters: Sequence[nn.Parameter], masks: Sequence[PackedMask]) -> None:
    """Zero the gradients of pruned weights."""
    for parameter, mask in zip(parameters, masks, strict=True):
        if parameter.grad is not None:
            prune_by_mask_(local_shard(parameter.grad).values, mask.unpack())
