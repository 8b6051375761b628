"""Compression in one shot: magnitudes pruned, what is left rounded to few bits.

Everything here is exact under any sharding: the support and the values are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qsdp.common.bitmask import PackedMask
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import LocalShard
from qsdp.sparsity.masks import keep_masks

BITS_GROUP = 128
"""Consecutive values of a row that share a scale when a model is rounded to few bits."""

Score = Callable[[int, LocalShard], Tensor]
"""What competes in place of the values of a tensor, by its magnitudes.
For a place among the tensors, and this rank's part of the tensor there, it gives a floating-point
tensor of that part's shape. The scores of a value are the same however the tensor is cut.
"""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def compress_(
    shards: Sequence[LocalShard],
    target: Compression,
    dims: Sequence[int],
    score: Score | None = None,
) -> list[PackedMask]:
    """Compress in place: pruned values become +0.0, the others the nearest of few. A collective.

    Values compete by their own magnitudes, or by ``score``.

    Returns:
        What was kept of each shard.
    """
    competing = shards if score is None else [scored(s, i, score) for i, s in enumerate(shards)]
    masks = keep_masks(competing, target, dims)
    packed = []
    for shard, mask in zip(shards, masks, strict=True):
        apply_(shard.values, mask, target)
        packed.append(PackedMask.of(mask))
    return packed


def scored(shard: LocalShard, index: int, score: Score) -> LocalShard:
    """``shard``, the part of tensor number ``index``, with scores in place of its values."""
    return replace(shard, values=score(index, shard))


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
