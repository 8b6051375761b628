"""Which ranks share a machine, and how a process group splits into machines."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from itertools import chain

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qsdp.compat.process_groups import destroy_group, new_group, unique_group_name


class Topology:
    """The node of each global rank.

    Nodes are consecutive ranks, as torchrun numbers them, each as large as its launcher says.

    Args:
        sizes: by global rank, the ranks on its node.
        mesh: [nodes, ranks of a node], which wins for the ranks that it holds.

    Raises ValueError where ``sizes`` do not add up to nodes and there is no mesh.
    """

    def __init__(self, sizes: Mapping[int, int], mesh: DeviceMesh | None = None) -> None:
        self.sizes = sorted(set(sizes.values()), reverse=True)
        nodes = _first_ranks(sizes)
        if nodes is None and mesh is None:
            raise ValueError(
                f"LOCAL_WORLD_SIZE is {[*sizes.values()]} on the ranks {[*sizes]}, which are no "
                "nodes of consecutive ranks; set ranks_per_node, or give a node_mesh"
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
        """Whether it is on this rank's node."""
        return global_rank in self._here


def launched_ranks() -> int:
    """Ranks on this node, as the launcher says; without one every rank has a node of its own.

    Raises ValueError where the launcher does not say a number of ranks.
    """
    said = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not said.isdecimal() or not int(said):
        raise ValueError(
            f"LOCAL_WORLD_SIZE is {said!r}; start with torchrun, or set it to the ranks of a node"
        )
    return int(said)


def _first_ranks(sizes: Mapping[int, int]) -> dict[int, int] | None:
    """By global rank, the first rank of its node; None where ``sizes`` do not add up to nodes."""
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


class Hops:
    """A process group of num_nodes x ranks_per_node ranks, node after node."""

    def __init__(
        self, local: dist.ProcessGroup, across: dist.ProcessGroup, *, is_owner: bool
    ) -> None:
        """Hold two groups; ``is_owner``: they end with this object.

        Args:
            local: the ranks of this rank's node.
            across: the ranks of all nodes that have this rank's place in theirs.
        """
        self.local, self.across = local, across
        self._ends = [weakref.finalize(self, destroy_group, g) for g in (local, across)]
        for end in self._ends:
            end.atexit = False
            if not is_owner:
                end.detach()

    @property
    def num_nodes(self) -> int:
        return self.across.size()

    @property
    def ranks_per_node(self) -> int:
        return self.local.size()

    def close(self) -> None:
        """Destroy the two groups, if they are this object's."""
        for end in self._ends:
            end()


def split(group: dist.ProcessGroup, nodes: list[list[int]]) -> Hops:
    """Split ``group`` into ``nodes``, its ranks node after node: a collective over ``group``."""
    name = unique_group_name(group)
    node, place = divmod(group.rank(), len(nodes[0]))
    local = new_group(nodes[node], group, f"{name}, node {node}")
    across = [each[place] for each in nodes]
    try:
        return Hops(local, new_group(across, group, f"{name}, place {place}"), is_owner=True)
    except BaseException:
        destroy_group(local)
        raise


def nodes_of(group: dist.ProcessGroup, topology: Topology) -> list[list[int]]:
    """The ranks of ``group`` by node.

    Raises ValueError where they are not as many on every node, node after node.
    """
    ranks = dist.get_process_group_ranks(group)
    if len(topology.sizes) > 1:
        raise ValueError(
            f"a two-hop reduce needs nodes of equal size, but nodes differ: they have "
            f"{' or '.join(map(str, topology.sizes))} ranks; set reduce to 'auto' or 'flat', or "
            "say with ranks_per_node or node_mesh how to split them"
        )
    nodes: dict[int, list[int]] = {}
    for rank in ranks:
        nodes.setdefault(topology.node(rank), []).append(rank)
    split = list(nodes.values())
    if len({len(node) for node in split}) > 1 or [*chain(*split)] != ranks:
        raise ValueError(
            f"the shard group's ranks {ranks} do not fill nodes of {topology.sizes[0]} "
            "evenly, one after the other; set ranks_per_node to a number that divides them, or "
            "reduce to 'flat'"
        )
    return split


def check_mesh(group: dist.ProcessGroup, mesh: DeviceMesh) -> None:
    """Raise ValueError unless ``mesh`` is 2-D, [nodes, ranks of a node], over the ranks of
    ``group``."""
    ranks = dist.get_process_group_ranks(group)
    if mesh.ndim != 2 or mesh.mesh.flatten().tolist() != ranks:
        raise ValueError(
            f"node_mesh holds the ranks {mesh.mesh.tolist()}; give a 2-D mesh [nodes, ranks of a "
            f"node] of the model's shard group, {ranks}"
        )


def is_worth_two_hops(nodes: list[list[int]]) -> bool:
    """Whether there are several nodes of several ranks each: else one hop has nothing to do."""
    return len(nodes) > 1 and len(nodes[0]) > 1
