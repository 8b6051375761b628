"""One-shot compression of a model that does not fit in memory: one tensor at a time.

The outcome is that of `compression.compress_` over all tensors at once, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsdp.common.bitmask import PackedMask
from qsdp.common.meshes import Groups, Reach
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import local_shard
from qsdp.sparsity.masks import Blocks, find_threshold
from qsdp.sparsity.one_shot import apply_, compress_
from qsdp.sparsity.threshold import Threshold


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies elsewhere, on a disk for one."""

    read: Callable[[], Tensor]
    """Brings all of it, the same values each time, to the CPU."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    """Its input dimension."""


def num_reads(target: Compression) -> int:
    """How often every tensor is read, but where ties are cut: once or twice more then."""
    return 4 if _compete(target) else 1


def compress_stream(
    tensors: Sequence[StoredTensor], target: Compression
) -> Iterator[tuple[Tensor, PackedMask]]:
    """Compress ``tensors``, in this order, each in memory only while it is looked at.

    Where magnitudes of all tensors compete, each is read once for each of the three digits of the
    radix-select, and a last time to be compressed; else once.

    Yields:
        A compressed tensor, and what of it was kept.
    """
    if not _compete(target):
        for tensor in tensors:
            yield _alone(tensor, target)
        return
    threshold = find_threshold([_Competing(tensor, target.block) for tensor in tensors], target)
    for i, tensor in enumerate(tensors):
        yield _among_others(tensor, target, threshold, i)


def _alone(tensor: StoredTensor, target: Compression) -> tuple[Tensor, PackedMask]:
    shard = local_shard(tensor.read())
    (packed,) = compress_([shard], target, [tensor.dim])
    return shard.values, packed


def _among_others(
    tensor: StoredTensor, target: Compression, threshold: Threshold, index: int
) -> tuple[Tensor, PackedMask]:
    shard = local_shard(tensor.read())
    if target.block == 1:
        mask = threshold.keep(index, shard)
    else:
        blocks = Blocks(shard, target.block, tensor.dim)
        mask = blocks.spread(threshold.keep(index, blocks.all))
    apply_(shard.values, mask, target)
    return shard.values, PackedMask.of(mask)


def _compete(target: Compression) -> bool:
    return target.sparsity > 0 and target.scope == "global"


@dataclass(frozen=True)
class _Competing:
    """What of a stored tensor competes, read anew each time: its values, or its blocks' sums."""

    tensor: StoredTensor
    block: int

    @property
    def values(self) -> Tensor:
        values = self.tensor.read()
        if self.block == 1:
            return values
        return Blocks(local_shard(values), self.block, self.tensor.dim).all.values

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
        return self.tensor.dtype if self.block == 1 else torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def positions(self, index_N: Tensor) -> Tensor:
        return index_N
