"""What gathers of changes send, and what is counted of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import qsdp
from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.delta import (
    HEADER_BYTES,
    decoded,
    installed,
    num_buckets,
    sent_while,
    take_sgd_step,
    wide,
)
from tests_distributed.support.helpers import full_state, make_batch
from tests_distributed.support.running import Run

FOUR: dict[str, Any] = {"weight_bits": 4, "grad_bits": 4, "embedding_bits": 4}
BUCKET = 128
NEVER = 1 << 30
"""No schedule draws anew so seldom."""


def _steps(model: Any, handle: qsdp.Handle, rates: list[float]) -> list[dict[str, int]]:
    """What each step of AdamW adds to the counters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    found = []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        loss_of = partial(model, *make_batch(model, step))
        found.append(sent_while(handle, lambda pass_=loss_of: torch.autograd.backward(pass_())))
        optimizer.step()
        optimizer.zero_grad()
    return found


# --- bytes ------------------------------------------------------------------------------------

SETTLED, STILL = 20, 14


def _bytes_by_step() -> tuple[int, list[int], list[int]]:
    """Of a gather that sends all; of each step at a small rate, and then without any."""
    model, handle = wide(1, {**FOUR, "gather": "once"})
    whole = _steps(model, handle, [0.0] * 2)[-1]["gather_sent_bytes"]
    model, handle = wide(1, FOUR)
    moving = _steps(model, handle, [1e-4] * SETTLED)
    model, handle = wide(1, {**FOUR, "delta_redraw_every": NEVER})
    still = _steps(model, handle, [0.0] * STILL)
    return (
        whole,
        [step["gather_sent_bytes"] for step in moving],
        [step["gather_sent_bytes"] for step in still],
    )


def test_a_step_sends_a_fifth_of_the_codes_and_nothing_where_nothing_changes(run: Run) -> None:
    for whole, moving, still in run(2, _bytes_by_step):
        assert moving[0] > 0.9 * whole
        assert max(moving[-5:]) < whole / 5
        assert still[0] > 0.9 * whole
        assert still[-1] <= 3 * HEADER_BYTES


# --- counters ---------------------------------------------------------------------------------


def _counted(bits: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Buckets of all; by step changed codes, redrawn buckets and decoded weights that differ."""
    config = {"weight_bits": bits, "embedding_bits": bits, "grad_bits": 8}
    model, handle = wide(2, {**config, "delta_redraw_every": NEVER})
    buckets = num_buckets(model, BUCKET, dist.get_world_size())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    found, before = [], {}
    for step in range(5):
        counts = sent_while(handle, lambda: before.update(now=decoded(model)))
        now = before.pop("now")
        matrices = [name for name, value in now.items() if value.ndim > 1]
        differing = sum(int((now[n] != before[n]).sum()) for n in matrices) if before else 0
        before.update(now)
        found.append((counts["changed_codes"], counts["redrawn_buckets"], differing))
        further = sent_while(handle, partial(_train, model, step))
        assert further["changed_codes"] == further["redrawn_buckets"] == 0
        optimizer.step()
        optimizer.zero_grad()
    return buckets, found


def _train(model: Any, step: int) -> None:
    torch.autograd.backward(model(*make_batch(model, step)))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_changed_codes_of_all_ranks_are_counted(run: Run, bits: int) -> None:
    everyone = run(3, _counted, bits)
    buckets, steps = everyone[0]
    assert everyone == [everyone[0]] * 3
    assert steps[0][:2] == (0, buckets)
    compared = 0
    for changed, redrawn, differing in steps[1:]:
        assert 0 < changed <= differing <= changed + redrawn * BUCKET
        assert redrawn < buckets / 10
        compared += changed == differing
    assert compared


def _redrawn_by_step(every: int, rate: float) -> tuple[int, int, list[int]]:
    """Buckets of what is trained, of what is not, and how many each step draws anew."""
    model, handle = installed(
        3, {**FOUR, "weight_bucket_size": 16, "delta_redraw_every": every}, frozen=True
    )
    trained, frozen = 0, 0
    for parameter in model.parameters():
        own = num_buckets(_Only(parameter), 16, dist.get_world_size())
        trained, frozen = (
            trained + own * parameter.requires_grad,
            frozen + own * (not parameter.requires_grad),
        )
    redrawn = [
        sent_while(handle, lambda at=step: take_sgd_step(model, at, rate))["redrawn_buckets"]
        for step in range(1 + 3 * every)
    ]
    return trained, frozen, redrawn


class _Only(torch.nn.Module):
    def __init__(self, parameter: Any) -> None:
        super().__init__()
        self.parameter = parameter


@pytest.mark.parametrize("every", [1, 3])
def test_each_trained_bucket_is_drawn_anew_once_in_each_period(run: Run, every: int) -> None:
    for trained, frozen, redrawn in run(2, _redrawn_by_step, every, 0.0):
        assert redrawn[0] == trained + frozen
        for start in range(1, 1 + 2 * every):
            assert sum(redrawn[start : start + every]) == trained
        if every > 1:  # they are spread over the period
            assert max(redrawn[1:]) < 0.8 * trained


def test_buckets_that_weights_leave_are_drawn_anew_at_once(run: Run) -> None:
    for trained, _, redrawn in run(2, _redrawn_by_step, 5, 10.0):
        assert sum(redrawn[1:]) > 3 * trained
        assert max(redrawn[1:]) <= trained


# --- what is frozen -----------------------------------------------------------------------------


EDITED = 8


def _frozen_group(odd: int) -> tuple[list[int], list[bool], int]:
    """Bytes of a frozen block by step; whether its weights are those edited; and all that cost.

    One rank edits its shard before the step of number ``EDITED``.
    """
    model, handle = installed(4, FOUR, trained="blocks.1.*")
    block = model.blocks[0]
    name = "blocks.0.qkv.weight"
    sent, seen = [], []
    for step in range(EDITED + 3):
        if step == EDITED and dist.get_rank() == odd:
            with torch.no_grad():
                local_shard(model.get_parameter(name)).values.copy_(torch.tensor(0.75))
        sent.append(sent_while(handle, lambda: _unshard(block))["gather_sent_bytes"])
        rows = slice(odd * 10, odd * 10 + 10)
        seen.append(bool((decoded(model)[name][rows] == 0.75).all()))
        take_sgd_step(model, step, 0.1)
    exact = full_state(model)[name]
    others = [row for row in range(30) if not odd * 10 <= row < odd * 10 + 10]
    error = (decoded(model)[name] - exact)[others].abs().max()
    assert 0 < error < 0.1
    return sent, seen, dist.get_world_size() - 1


def _unshard(block: FSDPModule) -> None:
    block.unshard()
    block.reshard()


@pytest.mark.parametrize("odd", [0, 2])
def test_a_frozen_group_costs_its_header_until_one_rank_edits_its_shard(run: Run, odd: int) -> None:
    for sent, seen, peers in run(3, _frozen_group, odd):
        assert sent[0] > 2 * peers * HEADER_BYTES
        assert max(sent[1:]) <= sent[0]
        assert sent[EDITED - 2] == sent[EDITED - 1] <= peers * HEADER_BYTES
        assert sent[EDITED] > sent[EDITED - 1]
        assert seen == [False] * EDITED + [True] * 3
