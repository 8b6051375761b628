"""Where a gather has its weights from: the wire, or payloads that are kept."""

from __future__ import annotations

from typing import Any, cast

import torch

import qsdp
from qsdp.comm.group_plan import Plan
from qsdp.comm.traffic import Traffic
from qsdp.comm.weight_cache import CacheablePayloads, Source, WeightCache
from qsdp.comm.wire_state import Wire
from tests.comm.test_group_plan import a_plan

CPU = torch.device("cpu")
TRAINS = [True, True, False, True]


def cache_of(gather: str) -> tuple[Plan, Wire, WeightCache]:
    plan = a_plan(3, len(TRAINS))
    wire = Wire(qsdp.QSDPConfig(gather=gather), Traffic(cast(Any, None)))
    return plan, wire, WeightCache(plan, wire)


def payloads_of(plan: Plan, places: tuple[int, ...], *, is_frozen: bool) -> CacheablePayloads:
    layout = plan.gather(places, is_frozen=is_frozen)
    buffer = torch.zeros(3 * layout.payload_bytes, dtype=torch.uint8)
    return CacheablePayloads(layout, buffer, 0, torch.zeros(3, dtype=torch.int64))


def sources(cache: WeightCache, trains: list[bool] = TRAINS) -> list[Source]:
    return [each.source for each in cache.find(trains)]


def test_gathered_twice_all_weights_cross_the_wire_and_nothing_is_kept() -> None:
    _, _, cache = cache_of("twice")
    for trains in (TRAINS, [True] * 4, [False] * 4):
        trained, frozen = cache.find(trains)
        assert (trained.source, frozen.source) == (Source.WIRE, Source.NOWHERE)
        assert trained.places == (0, 1, 2, 3)
    assert cache.num_bytes == 0


def test_what_a_forward_pass_keeps_serves_one_gather() -> None:
    plan, _, cache = cache_of("once")
    trained, frozen = cache.find(TRAINS)
    assert (trained.source, trained.places) == (Source.WIRE, (0, 1, 3))
    assert (frozen.source, frozen.places) == (Source.WIRE, (2,))
    kept = payloads_of(plan, trained.places, is_frozen=False)
    cache.keep_trained(trained.places, kept)
    # Unfrozen since: the backward pass has the weights of its forward pass.
    cache.keep_frozen(payloads_of(plan, frozen.places, is_frozen=True))
    trained, frozen = cache.find([True] * 4)
    assert trained.source is frozen.source is Source.CACHE
    assert trained.payloads is kept
    assert (trained.places, frozen.places) == ((0, 1, 3), (2,))
    cache.forget_frozen()
    assert sources(cache)[0] is Source.WIRE
    cache.keep_trained(trained.places, kept)
    cache.forget_trained()
    assert sources(cache)[0] is Source.WIRE


def test_frozen_payloads_are_kept_until_somebody_says_so_or_others_are_frozen() -> None:
    plan, wire, cache = cache_of("once")
    kept = payloads_of(plan, (2,), is_frozen=True)
    for _ in range(2):
        cache.keep_frozen(kept)
        assert cache.has_frozen
        assert cache.num_bytes == kept.buffer.numel()
        assert sources(cache) == sources(cache) == [Source.WIRE, Source.CACHE]
        cache.forget_frozen()
        assert sources(cache) == [Source.WIRE, Source.WIRE]
    cache.keep_frozen(kept)
    wire.is_exact = True  # which sends all, and keeps what there is for later
    assert sources(cache) == [Source.WIRE, Source.NOWHERE]
    wire.is_exact = False
    assert sources(cache) == [Source.WIRE, Source.CACHE]
    assert sources(cache, [False] * 4) == [Source.NOWHERE, Source.WIRE]
    assert sources(cache) == [Source.WIRE, Source.CACHE]
    plan.set_bits({})  # makes layouts anew
    assert sources(cache) == [Source.WIRE, Source.WIRE]
    cache.keep_frozen(payloads_of(plan, (2,), is_frozen=True))
    assert sources(cache, [True] * 4) == [Source.WIRE, Source.NOWHERE]
    assert not cache.has_frozen


def test_room_grows_and_is_counted() -> None:
    _, _, cache = cache_of("once")
    first = cache.room(64, CPU)
    assert cache.room(48, CPU).data_ptr() == first.data_ptr()
    assert cache.room(96, CPU).numel() == cache.num_bytes == 96
