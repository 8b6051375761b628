"""One-shot compression of a model that does not fit in memory: one tensor at a time.

The outcome is that of ``prune_and_round_`` over all tensors at once, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qsdp.common.bitmask import PackedMask
from qsdp.common.meshes import Groups
from qsdp.common.spread import Reach
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import LocalShard, local_shard
from qsdp.sparsity.masks import MaskBlocks, keep_masks
from qsdp.sparsity.prune_and_round import Score, prune_and_round_by_mask_
from qsdp.sparsity.threshold import Threshold, threshold_of_target


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be streamed, which lies elsewhere, for example on a disk."""

    read: Callable[[], Tensor]
    """Brings all of it, the same values each time, to the CPU."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    """Its input dimension."""


def num_reads(target: Compression) -> int:
    """How often streaming reads every tensor. Where ties are cut it is once or twice more."""
    return 4 if _compete(target) else 1


def compress_stream(
    tensors: Sequence[StoredTensor], target: Compression, score: Score | None = None
) -> Iterator[tuple[Tensor, PackedMask]]:
    """Compress a stream of ``tensors``, in this order, each in memory only while it is looked at.

    Values compete by their own magnitudes, or by ``score``. Where those of all tensors do, each
    tensor is read once for each of the three digits of the radix-select, and a last time to be
    compressed; else once.

    Yields:
        A compressed tensor, and what of it was kept.
    """
    competing = [_Competing(tensor, target.block, i, score) for i, tensor in enumerate(tensors)]
    threshold = threshold_of_target(competing, target) if _compete(target) else None
    for each in competing:
        yield _compress_one(each, target, threshold)


def _compress_one(
    competing: _Competing, target: Compression, threshold: Threshold | None
) -> tuple[Tensor, PackedMask]:
    shard, dim = local_shard(competing.tensor.read()), competing.tensor.dim
    part = competing.scored(shard)
    if threshold is None:
        (mask,) = keep_masks([part], target, [dim])
    elif target.block == 1:
        mask = threshold.keep(competing.index, part)
    else:
        blocks = MaskBlocks(part, target.block, dim)
        mask = blocks.spread(threshold.keep(competing.index, blocks.all))
    prune_and_round_by_mask_(shard.values, mask, target)
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
        """What competes by its magnitudes."""
        part = self.scored(local_shard(self.tensor.read()))
        if self.block == 1:
            return part.values
        return MaskBlocks(part, self.block, self.tensor.dim).all.values

    def scored(self, shard: LocalShard) -> LocalShard:
        """The whole tensor, with what its values compete by."""
        if self.score is None:
            return shard
        return replace(shard, values=self.score(self.index, shard))

    @property
    def groups(self) -> Groups:
        """None: the tensor is whole here."""
        return ()

    @property
    def reach(self) -> Reach:
        """This rank alone."""
        return Reach(())

    @property
    def numel(self) -> int:
        """Values that compete."""
        return math.prod(self.tensor.shape) // self.block

    @property
    def dtype(self) -> torch.dtype:
        """Element type of what competes."""
        is_own = self.block == 1 and self.score is None
        return self.tensor.dtype if is_own else torch.float32

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def positions(self, index_N: Tensor) -> Tensor:
        """The same indices: the tensor is whole here."""
        return index_N
