"""What ``--qsdp-bits auto`` decides by numbers that are invented."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qsdp.train.auto.cost_model import (
    STOCK,
    Measured,
    ModelledGroup,
    Transfer,
    WireWay,
    decide_by_cost,
    step_s,
    ways_to_compare,
)
from tests.support.links import FAST, LOOPBACK, SLOW, VALUES, group, measured, transfer


def chosen(facts: Measured) -> WireWay:
    return decide_by_cost(facts)[0]


def test_a_slow_link_takes_few_bits_gathered_once() -> None:
    way, predicted = decide_by_cost(measured(SLOW))
    assert way == WireWay(bits=4, gather="once")
    assert predicted[WireWay(bits=STOCK)] > 5 * predicted[way]


def test_a_link_that_costs_nothing_takes_stock_fsdp2() -> None:
    assert chosen(measured(1e15, latency_s=0.0)) == WireWay(bits=STOCK)


def test_ways_that_are_as_fast_keep_more_bits_and_less_memory() -> None:
    # All that travels is hidden by the computation, and the codec is free.
    free = {8: 0.0, 4: 0.0}
    facts = measured(FAST, encode_s=free, decode_s=free)
    assert chosen(facts) == WireWay(bits=8)
    # Where the codec of few bits is dear, a fast link does not pay for it.
    assert chosen(measured(FAST, decode_s={8: 3e-10, 4: 2e-8})).bits == 8


def test_memory_is_spared_where_it_costs_next_to_nothing() -> None:
    """Of two gathers one more is waited for, which here takes a given part of the step."""
    for part, gather in ((0.002, "twice"), (0.02, "once")):
        facts = measured(FAST, encode_s={8: 0.0, 4: 0.0}, decode_s={8: 0.0, 4: 0.0})
        wait = transfer(1e15, latency_s=part * facts.compute_s, busy=0.0)
        assert chosen(replace(facts, gather=wait, reduce=wait)) == WireWay(bits=8, gather=gather)


def test_where_each_collective_waits_the_fewest_are_taken() -> None:
    slow_to_answer = measured(FAST, latency_s=0.2, has_streams=True)
    assert chosen(slow_to_answer).gather == "once"
    # Stock FSDP2 has no kept payloads: it waits for two gathers a block.
    assert step_s(slow_to_answer, WireWay(bits=STOCK)) > step_s(
        slow_to_answer, WireWay(bits=8, gather="once")
    )


def test_the_ways_are_few_and_all_at_parity() -> None:
    assert [str(way) for way in ways_to_compare(measured(SLOW))] == [
        "stock FSDP2",
        "8 bits gathered twice",
        "8 bits gathered once",
        "4 bits gathered twice",
        "4 bits gathered once",
    ]


def test_gathering_once_is_left_out_where_it_would_keep_too_much() -> None:
    facts = measured(SLOW)
    once = WireWay(bits=4, gather="once")
    kept = 2 * 6 * int(0.57 * VALUES)  # of two ranks, six blocks
    assert facts.kept_bytes(once) == kept
    assert chosen(replace(facts, free_bytes=10 * kept)) == once
    # Of 8 bits, which take more, nothing fits there.
    assert WireWay(bits=8, gather="once") not in ways_to_compare(
        replace(facts, free_bytes=10 * kept)
    )
    way, predicted = decide_by_cost(replace(facts, free_bytes=10 * kept - 10))
    assert way == WireWay(bits=4)
    assert not [each for each in predicted if each.gather == "once"]


def test_a_rate_that_was_found_with_few_bytes_is_known_as_such() -> None:
    few, enough = (replace(transfer(SLOW), num_bytes=n) for n in (1 << 12, 1 << 18))
    facts = measured(SLOW)
    assert facts.too_few_bytes is None
    assert replace(facts, gather=few).too_few_bytes == 1 << 12
    assert replace(facts, stock_reduce=enough).too_few_bytes is None
    # Each of seven others was sent as much.
    assert replace(facts, reduce=few, num_ranks=8).too_few_bytes == 7 << 12
    assert replace(facts, reduce=replace(few, num_bytes=1 << 16), num_ranks=8).too_few_bytes is None
    # Of a small block no more is ever sent.
    small = replace(facts, block=group(1000, 0.01), gather=few)
    assert small.too_few_bytes is None


def test_a_step_by_hand() -> None:
    """Every term of [Note: Cost], with numbers that can be added up on paper."""
    own = transfer(1.0, latency_s=0.0, busy=0.0)
    nothing = {8: 0.0, 4: 0.0}
    sizes = {STOCK: 40, 8: 10, 4: 5}
    part = ModelledGroup(
        values=10,
        gather_bytes=sizes,
        reduce_bytes=sizes,
        local_bytes=10,
        forward_s=4.0,
        backward_s=8.0,
    )
    facts = measured(
        1.0,
        num_blocks=3,
        root=part,
        block=part,
        optimizer_s=1.0,
        encode_s=nothing,
        decode_s=nothing,
        **dict.fromkeys(("stock_gather", "stock_reduce", "gather", "reduce"), own),
    )
    compute = 4 * 4 + 4 * 8 + 1
    assert facts.compute_s == compute
    # Stock: a gather of the root, two of each block, four reduces, and nothing beside them.
    assert step_s(facts, WireWay(bits=STOCK)) == compute + 40 * (1 + 6 + 4)
    # Forward: two waits whole, two that a block hides 4 of; backward: 10 + 10 beside 8.
    forward = 10 + 10 + 2 * (10 - 4)
    assert step_s(facts, WireWay(bits=8)) == compute + forward + 10 + 10 + 10 + 2 * (20 - 8)
    assert step_s(facts, WireWay(bits=8, gather="once")) == compute + forward + 10 + 10 + 2 * (
        10 - 8
    )
    # Busy parts are hidden by nothing.
    busy = replace(facts, gather=replace(own, busy=1.0), reduce=replace(own, busy=1.0))
    assert step_s(busy, WireWay(bits=8)) == compute + 10 * (1 + 6 + 4)
    # The codec: a gather encodes one shard and decodes two, a reduce does one of both.
    coded = replace(facts, encode_s={8: 1.0, 4: 1.0}, decode_s={8: 100.0, 4: 100.0})
    added = (1 + 6) * 10 * 201 + 4 * 10 * 101
    assert step_s(coded, WireWay(bits=8)) == step_s(facts, WireWay(bits=8)) + added
    decoded = step_s(coded, WireWay(bits=8, gather="once")) - step_s(
        facts, WireWay(bits=8, gather="once")
    )
    assert decoded == (1 + 3) * 10 * 201 + 3 * 10 * 200 + 4 * 10 * 101
    # Two micro-batches gather twice as often and reduce once, beside the backward pass as ever; two
    # passes do it all twice, but for the optimizer.
    twice = replace(facts, micro_batches=2)
    more = 4 * 4 + forward + 4 * 8 + 10 + 2 * (10 - 8)
    assert step_s(twice, WireWay(bits=8)) == more + step_s(facts, WireWay(bits=8))
    assert step_s(replace(facts, passes=2), WireWay(bits=STOCK)) == 2 * (compute - 1 + 440) + 1


def test_between_nodes_of_several_ranks_two_hops_are_taken_where_they_pay() -> None:
    nodes = {
        "num_ranks": 8,
        "ranks_per_node": 4,
        "gather_across": between(4 * SLOW),
        "reduce_across": between(4 * SLOW),
        "gather_local": between(LOOPBACK),
        "reduce_local": between(LOOPBACK),
    }
    slow = measured(SLOW, **nodes)
    assert len(ways_to_compare(slow)) == 1 + 2 * len(ways_to_compare(measured(SLOW))[1:])
    assert chosen(slow).is_two_hop
    # Inside nodes as slow as between them, they only add a hop.
    same = dict.fromkeys(("gather_local", "reduce_local"), between(SLOW / 4))
    assert not chosen(replace(slow, **same)).is_two_hop


def between(bytes_per_s: float) -> Transfer:
    return transfer(bytes_per_s, latency_s=1e-4, busy=0.0)


@pytest.mark.parametrize(
    ("way", "has_nodes", "flags"),
    [
        (WireWay(bits=STOCK), True, {"qsdp_bits": None}),
        (WireWay(bits=8), False, {"qsdp_bits": 8}),
        (WireWay(bits=4, gather="once"), False, {"qsdp_bits": 4, "qsdp_gather": "once"}),
        (WireWay(bits=8), True, {"qsdp_bits": 8, "qsdp_reduce": "flat"}),
        (WireWay(bits=8, is_two_hop=True), True, {"qsdp_bits": 8}),
    ],
)
def test_a_way_is_named_by_the_flags_that_ask_for_it(
    way: WireWay, has_nodes: bool, flags: dict[str, Any]
) -> None:
    assert way.settings(has_nodes=has_nodes) == flags
