"""Which ranks share a machine, and how a process group splits into machines."""

import os
from itertools import chain
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qsdp import compat


class Topology:
    """Nodes of ``ranks_per_node`` consecutive global ranks, as torchrun numbers them.

    Without ``ranks_per_node`` the launcher's LOCAL_WORLD_SIZE counts; without that, every rank is
    taken to be on a node of its own.
    """

    def __init__(self, ranks_per_node: int | None = None) -> None:
        self.ranks_per_node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def node(self, global_rank: int) -> int:
        return global_rank // self.ranks_per_node


class Hops(NamedTuple):
    """A process group of num_nodes x ranks_per_node ranks, node after node."""

    local: dist.ProcessGroup
    """The ranks of this rank's node."""
    across: dist.ProcessGroup
    """The ranks of all nodes that have this rank's place in theirs."""

    @property
    def num_nodes(self) -> int:
        return self.across.size()

    @property
    def ranks_per_node(self) -> int:
        return self.local.size()

    def close(self) -> None:
        """Destroy the two groups."""
        dist.destroy_process_group(self.local)
        dist.destroy_process_group(self.across)


def split(group: dist.ProcessGroup, topology: Topology) -> Hops:
    """Split ``group`` into its nodes: a collective over ``group``.

    Raises ValueError where its ranks are not as many on every node, node after node.
    """
    ranks = dist.get_process_group_ranks(group)
    nodes = _by_node(ranks, topology)
    place = group.rank() % len(nodes[0])
    local = compat.new_group(nodes[group.rank() // len(nodes[0])], group)
    return Hops(local, compat.new_group([node[place] for node in nodes], group))


def split_by_mesh(group: dist.ProcessGroup, mesh: DeviceMesh) -> Hops:
    """The hops that a 2-D ``mesh`` [nodes, ranks of a node] over the ranks of ``group`` says.

    Raises ValueError where it is not such a mesh.
    """
    ranks = dist.get_process_group_ranks(group)
    if mesh.ndim != 2 or mesh.mesh.flatten().tolist() != ranks:
        raise ValueError(
            f"node_mesh holds the ranks {mesh.mesh.tolist()}; give a 2-D mesh [nodes, ranks of a "
            f"node] of the model's shard group, {ranks}"
        )
    return Hops(mesh.get_group(1), mesh.get_group(0))


def is_worth_two_hops(group: dist.ProcessGroup, topology: Topology) -> bool:
    """Whether ``group`` has several nodes of several ranks each, all alike."""
    try:
        nodes = _by_node(dist.get_process_group_ranks(group), topology)
    except ValueError:
        return False
    return len(nodes) > 1 and len(nodes[0]) > 1


def _by_node(ranks: list[int], topology: Topology) -> list[list[int]]:
    nodes: dict[int, list[int]] = {}
    for rank in ranks:
        nodes.setdefault(topology.node(rank), []).append(rank)
    split = list(nodes.values())
    if len({len(node) for node in split}) > 1 or [*chain(*split)] != ranks:
        raise ValueError(
            f"the shard group's ranks {ranks} do not fill nodes of {topology.ranks_per_node} "
            "evenly, one after the other; set ranks_per_node to a number that divides them, or "
            "reduce to 'flat'"
        )
    return split
