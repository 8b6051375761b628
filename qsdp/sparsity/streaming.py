"""One-shot compression of a model that does not fit in memory: one tensor at a time.

The outcome is that of ``one_shot.compress_`` over all tensors at once, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsdp.common.bitmask import PackedMask
from qsdp.common.meshes import Groups
from qsdp.common.spread import Reach
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import LocalShard, local_shard
from qsdp.sparsity.masks import Blocks, find_threshold, keep_masks
from qsdp.sparsity.one_shot import Score, apply_, scored
from qsdp.sparsity.threshold import Threshold


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies elsewhere, for example on a disk."""

    read: Callable[[], Tensor]
    """Brings all of it, the same values each time, to the CPU."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    """Its input dimension."""


def num_reads(target: Compression) -> int:
    """How often every tensor is read. Where ties are cut it is once or twice more."""
    return 4 if _compete(target) else 1


def compress_stream(
    tensors: Sequence[StoredTensor], target: Compression, score: Score | None = None
) -> Iterator[tuple[Tensor, PackedMask]]:
    """Compress ``tensors``, in this order, each in memory only while it is looked at.

    Values compete by their own magnitudes, or by ``score``. Where those of all tensors do, each
    tensor is read once for each of the three digits of the radix-select, and a last time to be
    compressed; else once.

    Yields:
        A compressed tensor, and what of it was kept.
    """
    competing = [_Competing(tensor, target.block, i, score) for i, tensor in enumerate(tensors)]
    threshold = find_threshold(competing, target) if _compete(target) else None
    for each in competing:
        yield _compressed(each, target, threshold)


def _compressed(
    competing: _Competing, target: Compression, threshold: Threshold | None
) -> tuple[Tensor, PackedMask]:
    shard, dim = local_shard(competing.tensor.read()), competing.tensor.dim
    part = competing.scored(shard)
    if threshold is None:
        (mask,) = keep_masks([part], target, [dim])
    elif target.block == 1:
        mask = threshold.keep(competing.index, part)
    else:
        blocks = Blocks(part, target.block, dim)
        mask = blocks.spread(threshold.keep(competing.index, blocks.all))
    apply_(shard.values, mask, target)
    return shard.values, PackedMask.of(mask)


def _compete(target: Compression) -> bool:
    return target.sparsity > 0 and target.scope == "global"


@dataclass(frozen=True)
class _Competing:
    """What of a stored tensor competes, read anew each time.

    It is its values or their scores, or the sums of these over blocks.
    """

    tensor: StoredTensor
    block: int
    index: int
    """Its place among all tensors."""
    score: Score | None

    @property
    def values(self) -> Tensor:
        part = self.scored(local_shard(self.tensor.read()))
        if self.block == 1:
            return part.values
        return Blocks(part, self.block, self.tensor.dim).all.values

    def scored(self, shard: LocalShard) -> LocalShard:
        """The whole tensor, with what its values compete by."""
        return shard if self.score is None else scored(shard, self.index, self.score)

    @property
    def groups(self) -> Groups:
        return ()

    @property
    def reach(self) -> Reach:
        return Reach(())

    @property
    def numel(self) -> int:
        return math.prod(self.tensor.shape) // self.block

    @property
    def dtype(self) -> torch.dtype:
        is_own = self.block == 1 and self.score is None
        return self.tensor.dtype if is_own else torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def positions(self, index_N: Tensor) -> Tensor:
        return index_N
