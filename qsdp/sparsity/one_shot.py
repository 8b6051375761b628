"""Compression in one shot: magnitudes pruned, what is left rounded to few bits.

Everything here is exact under any sharding: the support and the values are those of one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qsdp.common.bitmask import PackedMask
from qsdp.common.meshes import groups_of
from qsdp.common.rank_agreement import meet, mistakes_shared
from qsdp.compat.installed_wire import adapt_now, pending_adaptation
from qsdp.compat.interrupted_passes import abandon_interrupted_pass
from qsdp.compat.module_buffers import snapshot_buffers
from qsdp.compat.resharding import reshard
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import LocalShard
from qsdp.sparsity.masks import Prunable, keep_masks

BITS_GROUP = 128
"""Consecutive values of a row that share a scale when a model is rounded to few bits."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def compress_(
    shards: Sequence[LocalShard], target: Compression, dims: Sequence[int]
) -> list[PackedMask]:
    """Compress in place: pruned values become +0.0, the others the nearest of few. A collective.

    Returns:
        Per shard what was kept.
    """
    masks = keep_masks(shards, target, dims)
    packed = []
    for shard, mask in zip(shards, masks, strict=True):
        apply_(shard.values, mask, target)
        packed.append(PackedMask.of(mask))
    return packed


def apply_(values: Tensor, mask: Tensor, target: Compression) -> None:
    """Compress one tensor in place, of which ``mask`` keeps what ``target`` keeps."""
    keep_only_(values, mask)
    if target.bits is not None:
        round_(values, target.bits)


def keep_only_(values: Tensor, mask: Tensor) -> None:
    """Set to +0.0, in place, what ``mask`` (bool, of the same shape) does not keep."""
    # A product of the bit patterns: -1.0 * 0 is -0.0 and NaN * 0 is NaN, neither of which is a zero
    # on the wire. A fifth of the time of masked_fill_.
    values.view(_INTEGERS[values.itemsize]).mul_(mask)


def round_(values: Tensor, bits: int) -> None:
    """Round ``values`` in place to multiples of a scale a group: symmetric, 2**bits - 1 levels.

    Groups are 128 consecutive values of the last dimension. Zero stays zero; a group that holds a
    NaN or an Inf becomes NaN.
    """
    if values.ndim == 0 or values.numel() == 0:
        return
    rows = values.reshape(-1, values.shape[-1])
    for part, out in zip(rows.split(BITS_GROUP, 1), values.split(BITS_GROUP, -1), strict=True):
        largest = (1 << (bits - 1)) - 1
        bound = part.float().abs().amax(1, keepdim=True)
        scale = bound / largest
        scale = torch.where(scale > 0, scale, torch.where(scale == 0, 1.0, torch.nan))
        rounded = (part.float() / scale).round().clamp(-largest, largest) * scale
        # The largest floats would overflow, and -0.0 is not a zero on the wire.
        rounded = rounded.clamp(-bound, bound) + 0.0
        out.copy_(rounded.to(values.dtype).view(out.shape))


@contextlib.contextmanager
def compressed(
    model: nn.Module, target: float | str | Compression, patterns: Sequence[str] | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """Within the context, ``model`` is compressed in one shot; afterwards it is as before.

    A collective, in place, restored bit for bit, buffers included, also when the body raises. Costs
    a copy of the prunable shards and of the buffers. All ranks raise RuntimeError where target or
    patterns differ.

    Args:
        model: Any module, sharded or not; not in the middle of a forward or backward pass.
        target: A fraction of the prunable weights, or what `Compression.of` reads.
        patterns: The prunable set, as in `prunable_parameters`.

    Yields:
        The compressed parameters by name.
    """
    reshard(model)
    groups, call = groups_of(model.parameters()), "qsdp.compressed"
    with mistakes_shared(call, groups):
        chosen = Compression.of(target)
        prunable = Prunable.of(model, patterns)
        prunable.check(chosen)
        shards = prunable.shards()
        facts: dict[str, object] = {
            "target": str(chosen),
            "prunable parameters": prunable.names,
            "trained ones": prunable.trained().names,
        }
    meet(call, {**facts, "due before it": pending_adaptation(model)}, groups)
    adapt_now(model)
    before, restore_buffers = [shard.values.clone() for shard in shards], snapshot_buffers(model)
    try:
        with torch.no_grad():
            compress_(shards, chosen, prunable.dims)
        yield dict(zip(prunable.names, prunable.parameters, strict=True))
    except BaseException:
        abandon_interrupted_pass(model)
        raise
    finally:
        reshard(model)
        with torch.no_grad():
            for shard, values in zip(shards, before, strict=True):
                shard.values.copy_(values)
        restore_buffers()
