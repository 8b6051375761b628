"""Over which stages the ranks of a shard group exchange.

[Note: Stages] A topology is a list of stages, innermost first: inside a node, then between nodes.
Ranks are numbers of which each stage is a digit: with 2 ranks a node, rank 5 is place 1 of node 2.
In a stage those exchange that differ in its digit alone, so a rank is in one group a stage.

    reduce  walks the list forwards. In each stage every other rank is sent the rows of all owners
            that have its digit, and what comes is added up in fp32. A rank is left with rows of
            owners that have its own digits so far, and in the end with its own row.
    gather  walks it backwards. A rank hands on whatever payloads it has by then, so that each shard
            comes to a node once.

Flat is the list of one stage. What is left of a list without stages of one rank, which have nothing
to do, is flat too unless there are two or more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qsdp.codec.random_numbers import KeyStage
from qsdp.comm.nodes import Nodes, even_nodes
from qsdp.compat.process_groups import destroy_group, new_group, unique_group_name
from qsdp.config import QSDPConfig

Sizes = dict[KeyStage, int]
"""How many ranks exchange in each stage, innermost first."""


@dataclass(frozen=True)
class Topology:
    """A topology: a choice of ``QSDPConfig.reduce`` that goes by nodes."""

    words: str
    """What reports call it."""
    sizes: Callable[[int, int], Sizes]
    """The stages of (nodes, ranks of a node); raises ValueError where there can be none.
    The first is ``KeyStage.LOCAL``, inside a node; in it alone gradients have ``local_grad_bits``.
    """


def two_hop(num_nodes: int, ranks_per_node: int) -> Sizes:
    """The topology of two hops: inside each node, then between nodes."""
    return {KeyStage.LOCAL: ranks_per_node, KeyStage.ACROSS: num_nodes}


TOPOLOGIES = {
    "auto": Topology("two hops", two_hop),
    "two-hop": Topology("two hops", two_hop),
}
"""By what ``QSDPConfig.reduce`` may be, except flat."""


@dataclass(frozen=True)
class TopologySplit:
    """The stages that the topology splits a shard group's ranks into."""

    sizes: Sizes
    words: str = ""
    """What the report says, where nodes are even."""

    @property
    def is_flat(self) -> bool:
        """Whether all ranks exchange at once."""
        return len(self.sizes) == 1


def split(
    group: dist.ProcessGroup, nodes: Nodes, mesh: DeviceMesh | None, config: QSDPConfig
) -> TopologySplit:
    """The stages that the topology gives ``group``, by the nodes that its ranks are on.

    These are ``nodes``, or those of a node mesh.

    Raises ValueError where the config asks for stages that cannot be.
    """
    found = _split(group, nodes, mesh, config)
    is_by_node = len(found.sizes) > 1 and KeyStage.LOCAL in found.sizes
    if config.delta_codes == "node" and not is_by_node:
        ranks = dist.get_process_group_ranks(group)
        raise ValueError(
            f"delta_codes is 'node', but the shard group's ranks {ranks} do not fill several nodes "
            "of several ranks each: set ranks_per_node so that they do, or leave delta_codes out."
        )
    return found


def _split(
    group: dist.ProcessGroup, nodes: Nodes, mesh: DeviceMesh | None, config: QSDPConfig
) -> TopologySplit:
    flat = {KeyStage.FLAT: group.size()}
    if config.reduce == "flat":
        return TopologySplit(flat)
    topology = TOPOLOGIES[config.reduce]
    try:
        if mesh is None:
            num_nodes, ranks_per_node = even_nodes(group, nodes, config.reduce)
        else:
            num_nodes, ranks_per_node = mesh.shape
        sizes = topology.sizes(num_nodes, ranks_per_node)
    except ValueError:
        if config.needs_nodes:
            raise
        return TopologySplit(flat)
    assert prod(sizes.values()) == group.size()
    sizes = {stage: size for stage, size in sizes.items() if size > 1}
    words = f"{topology.words} over {num_nodes} nodes of {ranks_per_node} ranks"
    return TopologySplit(sizes if len(sizes) > 1 else flat, words)


class StageGroup:
    """The ranks that this rank exchanges with in one stage of the topology, by their digit."""

    def __init__(
        self, stage: KeyStage, group: dist.ProcessGroup, *, is_owner: bool = False
    ) -> None:
        """``is_owner``: the process group ends with this object."""
        self.stage, self.group = stage, group
        self._end = weakref.finalize(self, destroy_group, group) if is_owner else None
        if self._end is not None:
            self._end.atexit = False

    @property
    def size(self) -> int:
        """How many ranks they are, this one among them."""
        return self.group.size()

    @property
    def is_in_node(self) -> bool:
        """Whether links are those inside a node, which are fast."""
        return self.stage == KeyStage.LOCAL

    def close(self) -> None:
        """Destroy the group, if it is this object's."""
        if self._end is not None:
            self._end()


def open_stages(
    group: dist.ProcessGroup, sizes: Mapping[KeyStage, int], mesh: DeviceMesh | None
) -> tuple[StageGroup, ...]:
    """The process groups of this rank's stages in the topology. A collective over ``group``.

    They are over groups of their own where neither ``group`` nor ``mesh`` has one of the same
    ranks.
    """
    ranks = dist.get_process_group_ranks(group)
    known = [group]
    if mesh is not None and len(sizes) > 1:
        known += mesh.get_all_groups()
    by_ranks = {tuple(dist.get_process_group_ranks(each)): each for each in reversed(known)}
    name = ""
    stages: list[StageGroup] = []
    stride = 1
    try:
        for stage, size in sizes.items():
            first = group.rank() - group.rank() // stride % size * stride
            members = ranks[first : first + size * stride : stride]
            found = by_ranks.get(tuple(members))
            if found is None:
                name = name or unique_group_name(group)
                found = new_group(members, group, f"{name}, {stage.name} from rank {members[0]}")
                stages.append(StageGroup(stage, found, is_owner=True))
            else:
                stages.append(StageGroup(stage, found))
            stride *= size
    except BaseException:
        for each in stages:
            each.close()
        raise
    return tuple(stages)


def gathered_ranks(stages: Sequence[StageGroup]) -> tuple[int, ...]:
    """The ranks of a shard group in the order in which the topology gathers their payloads.

    Each stage puts side by side what its ranks have from the stages outside of it.
    """
    return _gathered_ranks(*(stage.size for stage in stages))


@lru_cache
def _gathered_ranks(*sizes: int) -> tuple[int, ...]:
    ranks, stride = [0], 1
    for size in sizes:
        ranks = [rank + digit * stride for rank in ranks for digit in range(size)]
        stride *= size
    return tuple(ranks)
