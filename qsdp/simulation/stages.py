"""Which of the simulated ranks exchange, stage by stage: written apart from ``qsdp.comm``."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from qsdp.codec.random_numbers import KeyStage
from qsdp.config import QSDPConfig
from qsdp.simulation.ranks import SimulatedRanks


class SimulatedStage(NamedTuple):
    """A simulated stage: in it ranks exchange that are 1, 2, ... ``size`` - 1 strides apart."""

    stage: KeyStage
    size: int
    stride: int

    def digit(self, rank: int) -> int:
        """The place of a rank, global or of the shard group, among those it exchanges with."""
        return rank // self.stride % self.size

    def peers(self, rank: int) -> range:
        """The ranks it exchanges with, itself among them."""
        first = rank - self.digit(rank) * self.stride
        return range(first, first + self.size * self.stride, self.stride)


def simulated_two_hop(num_nodes: int, ranks_per_node: int) -> dict[KeyStage, int]:
    """The simulated stages of two hops: inside each node, then between nodes."""
    return {KeyStage.LOCAL: ranks_per_node, KeyStage.ACROSS: num_nodes}


SIZES = {
    "auto": simulated_two_hop,
    "two-hop": simulated_two_hop,
}
"""How many ranks exchange in each stage, by what ``QSDPConfig.reduce`` may be, except flat."""


def simulated_stages(world: SimulatedRanks, config: QSDPConfig) -> list[SimulatedStage]:
    """The stages of a simulated shard group, innermost first.

    Those of one rank have nothing to do; if fewer than two are left, all ranks exchange at once.
    Raises ValueError where the config asks for stages that cannot be.
    """
    found = _stages(world, config)
    is_by_node = len(found) > 1 and found[0].stage == KeyStage.LOCAL
    if config.delta_codes == "node" and world.world_size > 1 and not is_by_node:
        raise ValueError(
            f"delta_codes is 'node', but {world.world_size} ranks do not fill several nodes of "
            "several ranks each: choose ranks_per_node so that they do, or leave delta_codes out."
        )
    return found


def _stages(world: SimulatedRanks, config: QSDPConfig) -> list[SimulatedStage]:
    flat = [SimulatedStage(KeyStage.FLAT, world.world_size, 1)]
    if config.reduce == "flat":
        return flat
    if not world.has_even_nodes:
        if config.needs_nodes:
            raise ValueError(
                f"a {config.reduce} reduce of {world.world_size} ranks cannot have nodes of "
                f"{world.ranks_per_node}: choose ranks_per_node so that it divides them."
            )
        return flat
    local = world.ranks_of_a_node
    sizes = SIZES[config.reduce](world.world_size // local, local)
    assert prod(sizes.values()) == world.world_size
    stages, stride = [], 1
    for stage, size in sizes.items():
        if size > 1:
            stages.append(SimulatedStage(stage, size, stride))
        stride *= size
    return stages if len(stages) > 1 else flat
