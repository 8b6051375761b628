"""Which ranks share a node, and how a process group splits into nodes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


class Nodes:
    """The nodes of all global ranks.

    Nodes are consecutive ranks, as torchrun numbers them, each as large as its launcher says.

    Args:
        sizes: The ranks on its node, by global rank.
        mesh: [nodes, ranks of a node], which wins for the ranks that it holds.

    Raises:
        ValueError: ``sizes`` do not add up to nodes and there is no mesh.
    """

    def __init__(self, sizes: Mapping[int, int], mesh: DeviceMesh | None = None) -> None:
        self.sizes = sorted(set(sizes.values()), reverse=True)
        nodes = _first_ranks(sizes)
        if nodes is None and mesh is None:
            raise ValueError(
                f"LOCAL_WORLD_SIZE is {[*sizes.values()]} on the ranks {[*sizes]}, which makes no "
                "nodes of consecutive ranks: set ranks_per_node, or give a node_mesh."
            )
        # Where nothing is known, ranks that the mesh does not hold count as elsewhere.
        self._nodes = nodes or {rank: rank for rank in sizes}
        me = dist.get_rank()
        self._here = {rank for rank, node in self._nodes.items() if node == self._nodes[me]}
        if mesh is not None:
            rows = mesh.mesh.tolist()
            self._here -= {*chain(*rows)}
            self._here.update(*(row for row in rows if me in row))

    def node(self, global_rank: int) -> int:
        """The first rank of its node, without a mesh."""
        return self._nodes[global_rank]

    def is_here(self, global_rank: int) -> bool:
        """Whether the rank is on this rank's node."""
        return global_rank in self._here


def launched_ranks() -> int:
    """Ranks on this node, as the launcher says; without one every rank has a node of its own.

    Raises ValueError where the launcher does not say a number of ranks.
    """
    said = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not said.isdecimal() or not int(said):
        raise ValueError(
            f"LOCAL_WORLD_SIZE is {said!r}: start with torchrun, or set it to the ranks of a node."
        )
    return int(said)


def _first_ranks(sizes: Mapping[int, int]) -> dict[int, int] | None:
    """The first rank of each global rank's node; None where ``sizes`` do not add up to nodes."""
    if len(set(sizes.values())) == 1:
        return {rank: rank - rank % size for rank, size in sizes.items()}
    nodes: dict[int, int] = {}
    first = 0
    while first in sizes:
        node = range(first, first + sizes[first])
        if {sizes.get(rank) for rank in node} != {len(node)}:
            return None
        nodes |= dict.fromkeys(node, first)
        first = node.stop
    return nodes if nodes.keys() == sizes.keys() else None


def even_nodes(group: dist.ProcessGroup, nodes: Nodes, reduce: str) -> tuple[int, int]:
    """How many nodes the ranks of ``group`` fill, and how many of them are on each.

    Raises ValueError where they do not fill nodes evenly, one after the other, as a ``reduce`` of
    this name needs it.
    """
    ranks = dist.get_process_group_ranks(group)
    if len(nodes.sizes) > 1:
        raise ValueError(
            f"a {reduce} reduce needs nodes of equal size, but these nodes have "
            f"{' or '.join(map(str, nodes.sizes))} ranks: set reduce to 'auto' or 'flat', or "
            "say with ranks_per_node or node_mesh how to split them."
        )
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes.node(rank), []).append(rank)
    found = list(by_node.values())
    if len({len(node) for node in found}) > 1 or [*chain(*found)] != ranks:
        raise ValueError(
            f"the shard group's ranks {ranks} do not fill nodes of {nodes.sizes[0]} "
            "evenly, one after the other: set ranks_per_node to a number that divides them, or "
            "reduce to 'flat'."
        )
    return len(found), len(found[0])


def check_mesh(group: dist.ProcessGroup, mesh: DeviceMesh) -> None:
    """Raise ValueError unless the mesh of nodes is 2-D, [nodes, ranks of a node], of ``group``."""
    ranks = dist.get_process_group_ranks(group)
    if mesh.ndim != 2 or mesh.mesh.flatten().tolist() != ranks:
        raise ValueError(
            f"node_mesh holds the ranks {mesh.mesh.tolist()}: give a 2-D mesh [nodes, ranks of a "
            f"node] of the model's shard group, {ranks}."
        )
