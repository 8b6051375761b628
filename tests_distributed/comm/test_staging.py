"""Payloads that go through host memory, as a GPU's do over gloo: here with CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.comm import transport
from tests_distributed.support import alike
from tests_distributed.support.alike import CASES, Case
from tests_distributed.support.apart import APART, train_apart
from tests_distributed.support.damage import damaged
from tests_distributed.support.running import Run, selection


@contextmanager
def staged() -> Iterator[list[int]]:
    """Inside, everything goes through buffers; yields their sizes."""
    sizes: list[int] = []
    make = transport._staging_of

    def noted(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return make(tensor).fill_(0x5A)  # which nothing that is sent may still be

    with (
        mock.patch.object(transport, "is_staged", return_value=True),
        mock.patch.object(transport, "_staging_of", noted),
    ):
        yield sizes


def _both_ways(case: Case) -> int:
    direct = alike.trained(case, "cpu")
    with staged() as sizes:
        through_buffers = alike.trained(case, "cpu")
    assert len(direct) == len(through_buffers) > 0
    for one, other in zip(direct, through_buffers, strict=True):
        assert torch.equal(one, other)
    return len(sizes)


# The others go the ways of these, and the same to all kernels.
@selection(
    "case", [(name,) for name in ("kept", "two hops", "replicas", "bf16", "sparse")], tuple(CASES)
)
def test_staged_payloads_give_the_same_numbers(run: Run, case: str) -> None:
    # Two steps: of one there are buffers when the next begins, and masks come with the second.
    short = replace(CASES[case], num_steps=2)
    for num_buffers in run(short.ranks, _both_ways, short):
        assert num_buffers > 10


def _staged(function: Any, *args: Any) -> Any:
    with staged():
        return function(*args)


@pytest.mark.parametrize("direction", ["gather", "reduce"])
def test_headers_are_read_on_the_way(run: Run, direction: str) -> None:
    for message in run(2, _staged, damaged, direction, 9, 3):
        assert "sent a payload with header" in message


@pytest.mark.parametrize("case", ["after good steps", "when all change"])
def test_all_ranks_say_which_gradients_differ(run: Run, case: str) -> None:
    steps, _ = APART[case]
    for message, _ in run(3, _staged, train_apart, steps, 1, {}):
        assert "has no gradient of blocks.1.wide.weight" in message


def _by_hand() -> None:
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    wanted = torch.arange(5) + 10 * torch.arange(size)[:, None]
    peers = [peer for peer in range(size) if peer != rank]
    with staged():
        for async_op in (False, True):
            output = torch.full((size, 5), -1, dtype=torch.int64)
            output[rank] = wanted[rank]  # the input is a part of the output
            arrival = transport.start_all_gather(
                output.view(-1), output[rank], group, async_op=async_op
            )
            seen = arrival.wait()
            assert torch.equal(output, wanted)
            assert seen is not None
            assert torch.equal(seen.view(size, 5), wanted)
        splits = [0 if peer == rank else 3 for peer in range(size)]
        sent = torch.full((3 * (size - 1),), rank, dtype=torch.uint8)
        received = torch.empty_like(sent)
        transport.start_all_to_all(received, sent, splits, splits, group).wait()
        assert received.tolist() == [peer for peer in peers for _ in range(3)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_byte_arrives_in_its_place(run: Run, ranks: int) -> None:
    run(ranks, _by_hand)
