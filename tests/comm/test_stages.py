"""A gather brings every payload to every rank, and a reduce every row to its owner.

They do so over whatever stages; one table has all topologies.
"""

from __future__ import annotations

from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from qsdp.codec.random_numbers import KeyStage
from qsdp.comm.reduce_scatter import reduce_exchanges
from qsdp.comm.topology import TOPOLOGIES, Topology, gathered_ranks, split
from qsdp.config import REDUCES, QSDPConfig
from qsdp.simulation.ranks import SimulatedRanks
from qsdp.simulation.stages import SIZES, SimulatedStage, simulated_stages

LISTS = [
    {KeyStage.FLAT: 5},
    {KeyStage.LOCAL: 3, KeyStage.ACROSS: 2},
    {KeyStage.LOCAL: 2, KeyStage.REPLICAS: 3, KeyStage.ACROSS: 2},
    {KeyStage.LOCAL: 2, KeyStage.REPLICAS: 2, KeyStage.FLAT: 3, KeyStage.ACROSS: 2},
]


def stages_of(sizes: dict[KeyStage, int]) -> list[SimulatedStage]:
    stages, stride = [], 1
    for stage, size in sizes.items():
        stages.append(SimulatedStage(stage, size, stride))
        stride *= size
    return stages


def plan_of(sizes: dict[KeyStage, int], rank: int) -> Any:
    """As much of a plan as a reduce over these stages asks for; a layout says how it was made."""
    stages = [
        SimpleNamespace(
            stage=each.stage,
            size=each.size,
            is_in_node=each.stage == KeyStage.LOCAL,
            group=SimpleNamespace(rank=partial(each.digit, rank)),
        )
        for each in stages_of(sizes)
    ]
    return SimpleNamespace(
        world_size=prod(sizes.values()),
        stages=stages,
        group=stages[0].group,
        reduce=lambda places, dtype, least, is_local: (dtype, is_local),
    )


@pytest.mark.parametrize("sizes", LISTS)
def test_a_gather_leaves_payloads_in_the_order_that_is_expected(sizes: dict[KeyStage, int]) -> None:
    num_ranks = prod(sizes.values())
    held = {rank: [rank] for rank in range(num_ranks)}
    for each in reversed(stages_of(sizes)):
        held = {rank: [p for peer in each.peers(rank) for p in held[peer]] for rank in held}
    expected = [*gathered_ranks(plan_of(sizes, 0).stages)]
    assert sorted(expected) == list(range(num_ranks))
    assert all(payloads == expected for payloads in held.values())


@pytest.mark.parametrize("sizes", LISTS)
def test_a_reduce_brings_each_row_of_each_rank_to_its_owner_once(
    sizes: dict[KeyStage, int],
) -> None:
    num_ranks = prod(sizes.values())
    wire: Any = SimpleNamespace(least_bits=0)
    exchanges, held = {}, {}
    for rank in range(num_ranks):
        plan = plan_of(sizes, rank)
        exchanges[rank] = reduce_exchanges(plan, (0,), torch.bfloat16, plan.group, wire)
        held[rank] = {row: [rank] for row in range(num_ranks)}
    for place, each in enumerate(stages_of(sizes)):
        owned = {rank: exchanges[rank][place].owned[each.digit(rank)] for rank in held}
        for rank, peers in ((rank, each.peers(rank)) for rank in held):
            # What a rank is sent is what its peers think that it owns.
            assert {exchanges[peer][place].owned[each.digit(rank)] for peer in peers} == {
                owned[rank]
            }
        held = {
            rank: {row: [r for p in each.peers(rank) for r in held[p][row]] for row in owned[rank]}
            for rank in held
        }
    for rank, rows in held.items():
        assert rows.keys() == {rank}
        assert sorted(rows[rank]) == list(range(num_ranks))


def test_sums_travel_in_fp32_and_only_links_inside_nodes_get_more_bits() -> None:
    plan = plan_of(LISTS[-1], 0)
    wire: Any = SimpleNamespace(least_bits=0)
    found = reduce_exchanges(plan, (0,), torch.bfloat16, plan.group, wire)
    assert [each.stage for each in found] == [*LISTS[-1]]
    layouts: list[Any] = [each.layout for each in found]
    assert layouts == [(torch.bfloat16, True), *[(torch.float32, False)] * 3]


def test_a_stage_of_all_ranks_goes_over_the_group_that_fsdp2_gives() -> None:
    plan = plan_of({KeyStage.FLAT: 4}, 2)
    wire: Any = SimpleNamespace(least_bits=0)
    given: Any = SimpleNamespace(rank=lambda: 2)
    (exchange,) = reduce_exchanges(plan, (0,), torch.float32, given, wire)
    assert exchange.group is given


def test_every_name_of_a_reduce_stands_in_both_tables() -> None:
    assert TOPOLOGIES.keys() == SIZES.keys() == {*REDUCES} - {"flat"}
    for name, topology in TOPOLOGIES.items():
        sizes = topology.sizes(8, 4)
        assert SIZES[name](8, 4) == sizes
        assert prod(sizes.values()) == 32
        assert next(iter(sizes)) == KeyStage.LOCAL
        assert 4 % sizes[KeyStage.LOCAL] == 0


def test_no_two_stages_have_the_same_word_in_the_keys() -> None:
    assert len(KeyStage.__members__) == len({*KeyStage})


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_codes_by_node_are_refused_where_the_innermost_stage_is_between_nodes(
    ranks_per_node: int,
) -> None:
    """As in a topology of three stages whose nodes have one rank each."""

    def racks(num_nodes: int, local: int) -> dict[KeyStage, int]:
        return {KeyStage.LOCAL: local, KeyStage.REPLICAS: 2, KeyStage.ACROSS: num_nodes // 2}

    group: Any = SimpleNamespace(size=lambda: 8)
    nodes: Any = SimpleNamespace(shape=(8 // ranks_per_node, ranks_per_node))
    config = QSDPConfig(weight_bits=4, gather="delta", delta_codes="node")
    world = SimulatedRanks(world_size=8, ranks_per_node=ranks_per_node)
    given = group, nodes, nodes, config

    def found() -> list[dict[KeyStage, int]]:
        simulated = {each.stage: each.size for each in simulated_stages(world, config)}
        return [simulated, split(*given).sizes]

    alone = simulated_stages(SimulatedRanks(world_size=1), config)
    assert [each.stage for each in alone] == [
        KeyStage.FLAT
    ]  # as a run of one rank, which sends nothing
    with (
        mock.patch.dict(TOPOLOGIES, {"auto": Topology("racks", racks)}),
        mock.patch.dict(SIZES, {"auto": racks}),
        mock.patch.object(dist, "get_process_group_ranks", return_value=[*range(8)]),
    ):
        if ranks_per_node == 2:
            assert found() == [racks(4, 2)] * 2
            return
        for find in (lambda: simulated_stages(world, config), lambda: split(*given)):
            with pytest.raises(ValueError, match=r"delta_codes is 'node', but .*\.$"):
                find()
