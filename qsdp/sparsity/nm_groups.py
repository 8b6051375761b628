"""Groups of consecutive values along a dimension, whole on every rank that holds a part of one."""

from __future__ import annotations

import torch
from torch import Tensor

from qsdp.compat.torch_collectives import all_gather_over_groups
from qsdp.sparsity.local_shards import LocalShard


def whole_groups(shard: LocalShard, dim: int, size: int) -> tuple[Tensor, int]:
    """The groups of an N:M pattern along ``dim`` of which this rank holds a part. A collective.

    Where the tensor is cut inside a group, its values are fetched from the other ranks, at most 2
    (size - 1) rows from each; nothing is sent where all cuts lie between groups.

    Args:
        shard: The part of a matrix whose ``dim`` is a multiple of ``size``, cut by one mesh axis at
            most.

    Returns:
        [groups, size, the other dimension], and which row of the first group is this rank's first.
    """
    rows_LR = shard.values.movedim(dim, 0)
    length, first = rows_LR.shape[0], shard.offset[dim]
    part = shard.parts[dim]
    if part == shard.shape[dim] or part % size == 0:
        return rows_LR.unflatten(0, (length // size, size)), 0
    begin, end = first // size * size, -(-(first + length) // size) * size
    if not length:
        begin = end = first
    rows = torch.empty(end - begin, rows_LR.shape[1], dtype=rows_LR.dtype, device=rows_LR.device)
    rows[first - begin : first - begin + length] = rows_LR
    index_E, edges_ER = _edges(shard, rows_LR, first, size)
    is_here = (index_E >= begin) & (index_E < end)
    rows[index_E[is_here] - begin] = edges_ER[is_here]
    return rows.unflatten(0, (rows.shape[0] // size, size)), first - begin


def _edges(shard: LocalShard, rows_LR: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """All ranks' rows that stand in groups which a cut divides, with their places (-1: none)."""
    last = first + rows_LR.shape[0]
    head = min(-(-first // size) * size, last)
    tail = max(last // size * size, head)
    places = [*range(first, head), *range(tail, last)]
    index = torch.full((2 * (size - 1),), -1, dtype=torch.int64, device=rows_LR.device)
    edges = rows_LR.new_zeros(2 * (size - 1), rows_LR.shape[1])
    if places:
        index[: len(places)] = torch.tensor(places, device=index.device)
        edges[: len(places)] = rows_LR[index[: len(places)] - first]
    edges = all_gather_over_groups(edges.reshape(-1), shard.groups).view(-1, edges.shape[1])
    return all_gather_over_groups(index, shard.groups), edges
