"""Where a tensor's local part lies in the whole: what thresholds and norms must know of a DTensor.

A plain tensor is its own whole and is held by every rank; a DTensor is cut by its `Shard`
placements and repeated by its `Replicate` ones, so an HSDP parameter is summed over its shard axis
alone and counted once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

Groups = tuple[dist.ProcessGroup, ...]
"""The process groups, one a sharded mesh axis, over which the parts of a tensor make the whole."""


class Part(Protocol):
    """What a threshold must know of this rank's part of a tensor."""

    @property
    def values(self) -> Tensor:
        """The part itself."""

    @property
    def groups(self) -> Groups:
        """Whose parts make the whole."""

    @property
    def numel(self) -> int:
        """Values in the whole."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def positions(self, index_N: Tensor) -> Tensor:
        """Map flat int64 indices [N] of the local part to flat indices [N] of the whole."""


@dataclass(frozen=True)
class LocalShard:
    """This rank's part of a tensor."""

    values: Tensor
    """The part itself, sharing storage with the tensor; any shape, possibly empty."""
    groups: Groups
    """Empty for a plain or replicated tensor: every rank holds all of it."""
    shape: tuple[int, ...]
    """Shape of the whole."""
    offset: tuple[int, ...]
    """Index in the whole of the part's first value."""
    parts: tuple[int, ...]
    """By dimension, what all cuts are multiples of: the whole size where there are none."""

    @property
    def numel(self) -> int:
        """Values in the whole."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def positions(self, index_N: Tensor) -> Tensor:
        """Map flat int64 indices [N] of the local part to flat indices [N] of the whole."""
        if not self.groups or not self.shape:
            return index_N
        positions_N = torch.zeros_like(index_N)
        coordinates = torch.unravel_index(index_N, self.values.shape)
        for coordinate_N, offset, size in zip(coordinates, self.offset, self.shape, strict=True):
            positions_N = positions_N * size + (coordinate_N + offset)
        return positions_N


def local_shard(tensor: Tensor) -> LocalShard:
    """Describe this rank's part of ``tensor``.

    Args:
        tensor: A plain tensor, or a DTensor placed by `Shard` and `Replicate` alone.

    Raises:
        ValueError: If another placement is met (partial sums, tensor parallelism under FSDP), or a
            sparse tensor.
    """
    if tensor.layout != torch.strided:
        raise ValueError(
            f"a gradient of shape {tuple(tensor.shape)} is {tensor.layout}; only dense ones can be "
            "added up and masked: make the layer without sparse=True"
        )
    if not isinstance(tensor, DTensor):
        values = tensor.detach()
        return LocalShard(values, (), tuple(values.shape), (0,) * values.ndim, tuple(values.shape))
    mesh = tensor.device_mesh
    sizes, offset, parts = list(tensor.shape), [0] * tensor.ndim, list(tensor.shape)
    groups = []
    for axis, placement in enumerate(tensor.placements):
        if type(placement) is Shard:
            # FSDP2 and DTensor cut as torch.chunk does: every part but the last ones is ceil(n/w).
            dim, size = placement.dim % tensor.ndim, sizes[placement.dim]
            part = -(-size // mesh.size(axis))
            start = min(part * mesh.get_local_rank(axis), size)
            sizes[dim], offset[dim] = min(part, size - start), offset[dim] + start
            if mesh.size(axis) > 1:
                groups.append(mesh.get_group(axis))
                parts[dim] = part if parts[dim] == tensor.shape[dim] else 1
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"a tensor placed as {tensor.placements} cannot be read shard by shard; only Shard "
                "and Replicate are supported: redistribute it first"
            )
    with torch.no_grad():
        values = tensor.to_local()
    assert list(values.shape) == sizes, f"local shape {tuple(values.shape)}, expected {sizes}"
    return LocalShard(values, tuple(groups), tuple(tensor.shape), tuple(offset), tuple(parts))


def by_groups(shards: Sequence[Part]) -> dict[Groups, list[int]]:
    """Indices of the shards that share their process groups, in the same order on every rank."""
    indices: dict[Groups, list[int]] = {}
    for i, shard in enumerate(shards):
        indices.setdefault(shard.groups, []).append(i)
    return indices


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in order, a tied one (the same object twice) once."""
    return list({id(tensor): tensor for tensor in tensors}.values())
