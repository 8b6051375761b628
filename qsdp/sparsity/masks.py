"""Which weights stay: masks of the largest magnitudes over shards, N:M patterns, blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qsdp.common.model_structure import unique_tensors
from qsdp.common.spread import spread_of
from qsdp.ops.reference.magnitude import keys_of
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import LocalShard, local_shard
from qsdp.sparsity.nm_groups import whole_groups
from qsdp.sparsity.threshold import threshold_of_target


def keep_masks(
    shards: Sequence[LocalShard], target: Compression, dims: Sequence[int]
) -> list[Tensor]:
    """The masks of what ``target`` keeps of each shard: bool of the local shape. A collective.

    Args:
        shards: Those of all tensors that compete, the same tensors in the same order on every rank.
        target: How many of them are kept, and in which shapes.
        dims: The input dimension of each, for patterns and blocks.
    """
    if target.pattern is not None:
        return [
            _pattern(shard, *target.pattern, dim) for shard, dim in zip(shards, dims, strict=True)
        ]
    if target.block == 1:
        threshold = threshold_of_target(shards, target)
        return [threshold.keep(i, shard) for i, shard in enumerate(shards)]
    blocks = [MaskBlocks(shard, target.block, dim) for shard, dim in zip(shards, dims, strict=True)]
    threshold = threshold_of_target([block.owned for block in blocks], target)
    return [block.spread(threshold.keep(i, block.all)) for i, block in enumerate(blocks)]


def magnitude_masks(parameters: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks that keep the largest magnitudes over all parameters: n - round(sparsity * n).

    It is exactly that many over all of them together. A collective; see
    ``threshold.global_threshold`` for the ties.

    Args:
        parameters: Plain tensors or DTensors by name, the same order on every rank; a tensor that
            stands under two names counts once.
        sparsity: Fraction to prune, from 0 (nothing) to below 1.

    Returns:
        A bool mask of the local shape by name, True where the weight is kept.
    """
    tensors = unique_tensors(parameters.values())
    spread = spread_of(tensors)
    # No parameters: no rank knows which of them the others train.
    shards = [local_shard(tensor.detach(), spread) for tensor in tensors]
    masks = keep_masks(shards, Compression(sparsity=sparsity), [1] * len(shards))
    by_id = {id(tensor): mask for tensor, mask in zip(tensors, masks, strict=True)}
    return {name: by_id[id(tensor)] for name, tensor in parameters.items()}


def _pattern(shard: LocalShard, keep: int, size: int, dim: int) -> Tensor:
    """The ``keep`` largest of every ``size`` along ``dim``, of equal ones the first."""
    rows_GMR, first = whole_groups(shard, dim, size)
    order = keys_of(rows_GMR).sort(dim=1, descending=True, stable=True).indices
    mask_GMR = torch.zeros_like(rows_GMR, dtype=torch.bool).scatter_(1, order[:, :keep], True)
    return _own_part(mask_GMR, shard, dim, first)


def _own_part(mask_GMR: Tensor, shard: LocalShard, dim: int, first: int) -> Tensor:
    moved = shard.values.movedim(dim, 0)
    rows = mask_GMR.flatten(0, 1)[first : first + moved.shape[0]]
    return rows.reshape(moved.shape).movedim(0, dim)


class MaskBlocks:
    """The blocks that masks of one matrix keep or prune whole, by the sums of their magnitudes."""

    def __init__(self, shard: LocalShard, size: int, dim: int) -> None:
        self._shard, self._dim, self._size = shard, dim, size
        rows_GMR, self._first = whole_groups(shard, dim, size)
        sums_GR = torch.zeros_like(rows_GMR[:, 0], dtype=torch.float32)
        for place in range(size):  # in this order on any number of ranks
            sums_GR += rows_GMR[:, place].abs()
        rest = 1 - dim
        begin = (shard.offset[dim] - self._first) // size
        shape = (shard.shape[dim] // size, shard.shape[rest])
        offset = (begin, shard.offset[rest])
        self.all = replace(shard, values=sums_GR, shape=shape, offset=offset, parts=shape)
        # A block that several ranks see is counted by the one that holds its first row.
        own = 1 if self._first else 0
        offset = (begin + own, shard.offset[rest])
        self.owned = replace(self.all, values=sums_GR[own:], offset=offset)

    def spread(self, keep_GR: Tensor) -> Tensor:
        """The mask of the matrix's local part that follows from the blocks' mask."""
        mask_GMR = keep_GR[:, None].expand(-1, self._size, -1)
        return _own_part(mask_GMR, self._shard, self._dim, self._first)
