"""Payloads travel as they should, whoever is late and whoever is gone."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.comm import transport
from tests_distributed.support.running import Run


def _values(numel: int, of: int, to: int) -> Tensor:
    """What rank ``of`` sends to rank ``to``."""
    return torch.full((numel,), 16 * of + to, dtype=torch.uint8)


def _all_to_all(numel: int) -> Tensor:
    """``numel`` bytes for each other rank; those that arrive, as a plan of ``reduce`` has them."""
    me, size = dist.get_rank(), dist.get_world_size()
    peers = [rank for rank in range(size) if rank != me]
    splits = [numel if rank != me else 0 for rank in range(size)]
    sent = torch.cat([_values(numel, me, rank) for rank in peers])
    received = torch.zeros_like(sent)
    group = dist.group.WORLD
    assert group is not None
    arrival = transport.all_to_all(received, sent, splits, splits, group)
    assert torch.equal(arrival.wait(), torch.cat([_values(numel, rank, me) for rank in peers]))
    return received


def _all_gather(numel: int, *, in_place: bool, is_async: bool) -> None:
    me, size = dist.get_rank(), dist.get_world_size()
    gathered = torch.zeros(size * numel, dtype=torch.uint8)
    own = gathered.chunk(size)[me] if in_place else torch.zeros(numel, dtype=torch.uint8)
    own.copy_(_values(numel, me, me))
    group = dist.group.WORLD
    assert group is not None
    transport.all_gather(gathered, own, group, async_op=is_async).wait()
    assert torch.equal(gathered, torch.cat([_values(numel, rank, rank) for rank in range(size)]))


def _all_ways() -> None:
    for numel in (1, 40_000):
        _all_to_all(numel)
        for in_place in (True, False):
            for is_async in (True, False):
                _all_gather(numel, in_place=in_place, is_async=is_async)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_gets_what_was_sent_to_it(run: Run, ranks: int) -> None:
    run(ranks, _all_ways)


def _order() -> list[str]:
    calls: list[str] = []

    def noting(name: str) -> Any:
        function = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        return mock.patch.object(dist, name, call)

    with noting("irecv"), noting("isend"):
        _all_to_all(100)
    return calls


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_says_that_it_is_ready_before_it_sends(run: Run, ranks: int) -> None:
    others = ranks - 1
    assert run(ranks, _order) == [["irecv"] * others + ["isend"] * others] * ranks


def _dropped() -> list[int]:
    """Drops exchanges that are larger than what a connection buffers.

    Says how many are kept, and how many when one more has arrived.
    """
    group = dist.group.WORLD
    assert group is not None
    others = dist.get_world_size() - 1
    for _ in range(3):
        sent = torch.ones(8_000_000 * others, dtype=torch.uint8)
        splits = [8_000_000] * dist.get_world_size()
        splits[dist.get_rank()] = 0
        transport.all_to_all(torch.zeros_like(sent), sent, splits, splits, group)
    del sent
    gc.collect()
    dist.barrier()  # on the same connections
    kept = [len(transport._unclaimed[group])]
    _all_ways()
    return [*kept, len(transport._unclaimed)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_message_that_nobody_waits_for_harms_no_other(run: Run, ranks: int) -> None:
    assert run(ranks, _dropped) == [[3, 0]] * ranks


def _dropped_later() -> list[int]:
    """Two exchanges, of which the second is dropped before the first has arrived."""
    group = dist.group.WORLD
    assert group is not None
    splits = [8 if rank != dist.get_rank() else 0 for rank in range(dist.get_world_size())]
    sent = torch.ones(sum(splits), dtype=torch.uint8)
    first = transport.all_to_all(torch.zeros_like(sent), sent, splits, splits, group)
    transport.all_to_all(torch.zeros_like(sent), sent, splits, splits, group)
    first.wait()
    kept = [len(transport._unclaimed[group])]
    _all_to_all(8)
    return [*kept, len(transport._unclaimed)]


def test_what_came_after_an_arrival_is_kept(run: Run) -> None:
    assert run(2, _dropped_later) == [[1, 0]] * 2
