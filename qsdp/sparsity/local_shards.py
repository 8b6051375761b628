"""Where a tensor's local part lies in the whole: what thresholds and norms must know of a DTensor.

A plain tensor is its own whole and is held by every rank; a DTensor is cut by its ``Shard``
placements and repeated by its ``Replicate`` ones, so an HSDP parameter is summed over its shard
axis alone and counted once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from qsdp.common.checksum import checksum
from qsdp.common.meshes import Groups
from qsdp.common.sharding import chunk
from qsdp.common.spread import Reach, Spread
from qsdp.compat.torch_collectives import all_gather_over_groups


class LocalShardLike(Protocol):
    """What is like a local shard to a threshold: this rank's part of a tensor."""

    @property
    def values(self) -> Tensor:
        """The part itself."""

    @property
    def groups(self) -> Groups:
        """The process groups whose parts make the whole."""

    @property
    def reach(self) -> Reach:
        """The ranks whose parts compete with it, those of tensors of their own included."""

    @property
    def numel(self) -> int:
        """Values in the whole."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the part."""

    @property
    def device(self) -> torch.device:
        """Where the part lies."""

    def positions(self, index_N: Tensor) -> Tensor:
        """Map flat int64 indices [N] of the local part to flat indices [N] of the whole."""


@dataclass(frozen=True)
class LocalShard:
    """This rank's local shard of a tensor, and where in the whole it lies."""

    values: Tensor
    """The part itself, sharing storage with the tensor; any shape, possibly empty."""
    groups: Groups
    """The groups that cut it; none for a plain or replicated tensor: every rank holds all of it."""
    shape: tuple[int, ...]
    """Shape of the whole."""
    offset: tuple[int, ...]
    """Index in the whole of the part's first value."""
    parts: tuple[int, ...]
    """What all cuts of a dimension are multiples of: the whole size where there are none."""
    reach: Reach
    """The ranks whose parts compete with it."""
    is_frozen: bool
    """Whether it is the part of a parameter that is not trained."""

    @property
    def numel(self) -> int:
        """Values in the whole."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the part."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the part lies."""
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


def local_shard(tensor: Tensor, spread: Spread | None = None) -> LocalShard:
    """The local shard of ``tensor``: this rank's part.

    Args:
        tensor: A plain tensor, or a DTensor placed by ``Shard`` and ``Replicate`` alone.
        spread: That of all tensors that it is counted with; None: its own ranks are all.

    Raises:
        ValueError: Another placement is met (partial sums, tensor parallelism under FSDP), or a
            sparse tensor.
    """
    if tensor.layout != torch.strided:
        raise ValueError(
            f"a gradient of shape {tuple(tensor.shape)} is {tensor.layout}, but only dense ones "
            "can be added up and masked: make the layer without sparse=True."
        )
    is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    if not isinstance(tensor, DTensor):
        values, shape = tensor.detach(), tuple(tensor.shape)
        return LocalShard(values, (), shape, (0,) * tensor.ndim, shape, Reach(()), is_frozen)
    mesh = tensor.device_mesh
    sizes, offset, parts = list(tensor.shape), [0] * tensor.ndim, list(tensor.shape)
    groups, is_first = [], True
    for axis, placement in enumerate(tensor.placements):
        if type(placement) is Shard:
            dim, size = placement.dim % tensor.ndim, sizes[placement.dim]
            _, part = chunk(size, 0, mesh.size(axis))
            start, sizes[dim] = chunk(size, mesh.get_local_rank(axis), mesh.size(axis))
            offset[dim] += start
            if mesh.size(axis) > 1:
                groups.append(mesh.get_group(axis))
                parts[dim] = part if parts[dim] == tensor.shape[dim] else 1
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"a tensor is placed as {tensor.placements}, but only Shard and Replicate can be "
                "read shard by shard: redistribute it first."
            )
        else:
            is_first &= mesh.get_local_rank(axis) == 0
    with torch.no_grad():
        values = tensor.to_local()
    assert list(values.shape) == sizes, f"local shape {tuple(values.shape)}, expected {sizes}"
    reach = Reach(tuple(groups))
    if spread and mesh in spread:
        reach = spread[mesh]._replace(is_counted=spread[mesh].is_counted and is_first)
    return LocalShard(
        values,
        tuple(groups),
        tuple(tensor.shape),
        tuple(offset),
        tuple(parts),
        reach,
        is_frozen,
    )


def shard_without_copies(shard: LocalShardLike) -> LocalShardLike:
    """A local shard, of which one that is frozen and the same on all ranks counts once.

    What is frozen is often sharded inside nodes, a copy on each. A collective for frozen ones of
    others' reach.
    """
    if not isinstance(shard, LocalShard) or not shard.is_frozen:
        return shard
    if shard.reach.groups == shard.groups or not shard.reach.groups:
        return shard
    place = hash((shard.offset, shard.values.shape)) % (1 << 62)
    mine = [shard.reach.first_rank, place, checksum([shard.values]) % (1 << 62)]
    row = torch.tensor(mine, device=shard.device)
    parts: dict[int, set[tuple[int, int]]] = {}
    for rank, *content in all_gather_over_groups(row, shard.reach.groups).view(-1, 3).tolist():
        parts.setdefault(rank, set()).add(tuple(content))
    if any(part != parts[shard.reach.first_rank] for part in parts.values()):
        return shard
    is_first = shard.reach.is_counted and shard.reach.first_rank == min(parts)
    return replace(shard, reach=Reach(shard.reach.groups, is_first, min(parts)))
