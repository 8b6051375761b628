"""CrAM's second pass: the weights follow the first gradient up, and are compressed then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qsdp.common.bitmask import PackedMask
from qsdp.common.model_structure import unique_tensors
from qsdp.compat.earlier_losses import invalidate_losses, is_about_invalid_loss
from qsdp.compat.installed_wire import aside
from qsdp.compat.interrupted_passes import abandon_passes
from qsdp.compat.resharding import reshard_all
from qsdp.methods.optimizer_wrapper import SupportCallback
from qsdp.methods.rollback import snapshot_buffers_and_grads
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import local_shard
from qsdp.sparsity.prunable import Prunable
from qsdp.sparsity.prune_and_round import prune_and_round_, prune_by_mask_


@contextmanager
def at_compressed_point(
    model: nn.Module,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    scale: float,
    prunable: Prunable,
    target: Compression,
    sparse_grad: bool,
    on_support_change: SupportCallback | None,
) -> Iterator[None]:
    """CrAM's second pass stands inside, and leaves in ``.grad`` the gradient at that point.

    The weights are those of before again at the end.

    Args:
        model: Its buffers and other gradients stay as they are. Losses that were made of it outside
            cannot be sent backward inside, nor the other way round.
        parameters: Those of the optimizer, each once, with the gradients of the first pass,
            ``grads``.
        scale: The weights move by this times their gradient.
        prunable: What is compressed, to ``target``.
        sparse_grad: Mask the gradient as the weights were.
        on_support_change: Hears of the masks, where there are some, and of their end.

    Raises:
        RuntimeError: A loss of outside was sent backward inside.
    """
    tell = on_support_change if target.fraction else None
    ascents = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
    edited = unique_tensors([*(p for p, _ in ascents), *prunable.parameters])
    shards = [local_shard(parameter) for parameter in edited]
    with torch.no_grad():
        before = [shard.values.clone() for shard in shards]
    restore = snapshot_buffers_and_grads(model, parameters)
    with aside(model):
        try:
            # A group that had no backward pass is still gathered, and would hide the edit.
            reshard_all(model)
            invalidate_losses(model)
            with torch.no_grad():
                for parameter, grad in ascents:
                    local_shard(parameter).values.add_(local_shard(grad).values, alpha=scale)
                masks: list[PackedMask] = []
                if target.fraction or target.bits is not None:  # SAM compresses nothing
                    masks = prune_and_round_(prunable.shards(), target, prunable.dims)
                if tell is not None:
                    tell(_unpacked(prunable.parameters, masks), with_grads=sparse_grad)
            clear_grads(parameters)
            yield
            if sparse_grad and target.fraction:
                with torch.no_grad():
                    _mask_grads(prunable.parameters, masks)
        except BaseException as error:
            abandon_passes(model)
            if is_about_invalid_loss(error):
                raise RuntimeError(
                    "a loss that was made before the second pass is sent backward in it, where "
                    "weights are others: run the forward pass inside as well."
                ) from error
            raise
        finally:
            # A forward pass without a backward one left weights gathered: the compressed ones.
            reshard_all(model)
            invalidate_losses(model)
            with torch.no_grad():
                for shard, values in zip(shards, before, strict=True):
                    shard.values.copy_(values)
                if tell is not None:
                    tell(None)
            restore()


def clear_grads(parameters: Sequence[Tensor]) -> None:
    """Clear the gradients, so that a pass begins from none."""
    for parameter in parameters:
        parameter.grad = None


def run_closure(closure: Callable[[], Any]) -> Any:
    """Run ``closure`` with gradients, as torch's optimizers do, and return its result."""
    with torch.enable_grad():
        return closure()


def take_grad(parameter: Tensor) -> Tensor | None:
    """Take the gradient from its parameter, so that the next pass starts a new one."""
    grad, parameter.grad = parameter.grad, None
    if grad is None:
        return None
    # DDP's gradient_as_bucket_view hands out views of buckets that the next pass overwrites, and
    # nothing tells such a gradient from one that is its parameter's own.
    return grad if local_shard(grad).groups else grad.clone()


def add_grads(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add ``grads`` of the first pass to the gradients of the second."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if parameter.grad is None:
            parameter.grad = grad
        elif grad is not None:
            local_shard(parameter.grad).values.add_(local_shard(grad).values)


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
