"""Gather once, and gathers ahead of time: what each promises beside its numbers.

tests_distributed/simulation/test_combinations.py compares the numbers with the simulation.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import qsdp
from qsdp.comm.all_gather import GatheringWork
from qsdp.fsdp import gather_hook
from tests_distributed.support.helpers import full_grads, full_state, make_batch, make_model, shard
from tests_distributed.support.running import Run
from tests_distributed.support.training import assert_same_run, train


def _gathered(options: dict[str, Any], gather: str, micro_batches: int = 1) -> Any:
    model = shard(make_model(**options))
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=16, gather=gather))
    result = train(model, micro_batches=micro_batches)
    counts = handle.traffic.snapshot()
    groups: dict[int | None, int] = {}
    for row in handle.report().rows:
        groups[row.group] = groups.get(row.group, 0) + 1
    return result, counts["gather_sent_bytes"], handle.kept_bytes


@pytest.mark.parametrize(
    ("options", "micro_batches"),
    [({}, 1), ({"checkpointing": True}, 2), ({"tied": True, "unused": True}, 1)],
)
def test_the_backward_pass_of_gather_once_sees_the_forward_weights_for_no_bytes(
    run: Run, options: dict[str, Any], micro_batches: int
) -> None:
    twice = run(3, _gathered, options, "twice", micro_batches)
    once = run(3, _gathered, options, "once", micro_batches)
    for (expected, all_bytes, kept_twice), (found, half, kept) in zip(twice, once, strict=True):
        assert_same_run(found, expected)
        assert kept_twice == 0
        # Per step and micro-batch, twice sends all groups and all but the root's again; once keeps
        # the payloads of these, the own one among three.
        passes = 2 * micro_batches
        assert all_bytes - half == passes * kept * 2 // 3


def _unaltered(gather: str) -> Any:
    model = shard(make_model())
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=16, gather=gather))
    results = []
    for seed in range(3):
        loss = model(*make_batch(model, seed))
        with torch.no_grad():  # a validation between a forward pass and its backward pass
            model.eval()
            results.append(float(model(*make_batch(model, 50))))
            model.train()
        with handle.exact(), torch.no_grad():
            results.append(float(model(*make_batch(model, 50))))
        loss.backward()
        results.append(float(loss))
        # Two passes of a step, the second with other weights, as CrAM takes them.
        grads = {name: p.grad for name, p in model.named_parameters()}
        for p in model.parameters():
            if p.grad is not None:
                p.data.add_(p.grad, alpha=0.1)
            p.grad = None
        again = model(*make_batch(model, seed))
        again.backward()
        results.append(float(again))
        assert all(grads[name] is not None for name in full_grads(model))
        model.zero_grad()
    return results, full_state(model)


def test_kept_payloads_never_outlive_the_weights_they_are_of(run: Run) -> None:
    for found, expected in zip(
        run(2, _unaltered, "once"), run(2, _unaltered, "twice"), strict=True
    ):
        assert_same_run(found, expected)


def _with_frozen(gather: str) -> Any:
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    shard(model, nested=False)
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=16, gather=gather))
    sent = [0]
    states = []
    for step in range(4):
        if step == 3:
            with torch.no_grad():
                model.blocks[0].get_parameter("qkv.weight").mul_(2.0)
        losses, state = train(model, steps=1, first=step)
        states.append((losses, state))
        sent.append(handle.traffic.snapshot()["gather_sent_bytes"])
    return [b - a for a, b in pairwise(sent)], states, handle.kept_bytes


def test_frozen_weights_are_gathered_once_for_all_steps_until_they_are_edited(run: Run) -> None:
    once = run(2, _with_frozen, "once")
    twice = run(2, _with_frozen, "twice")
    for (sent, states, kept), (all_sent, _, _) in zip(once, twice, strict=True):
        first, second, third, edited = sent
        assert first > second == third
        assert third < edited < first
        assert all_sent == [all_sent[0]] * 4
        assert kept > 0
        for name, value in once[0][1][2][1].items():
            assert torch.equal(value, states[2][1][name])


# --- gathers ahead of time --------------------------------------------------------------------


def _ahead(is_ahead: bool, gather: str, hops: str) -> Any:
    model = shard(make_model())
    config = qsdp.QSDPConfig(bucket_size=16, gather=gather, reduce=hops, ranks_per_node=2)
    qsdp.install(model, config)
    if is_ahead:
        blocks = cast(list[FSDPModule], list(model.blocks))
        for block, following in pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])
    started: list[GatheringWork] = []
    under_way = []

    def enter(*_: Any) -> None:
        under_way.append(sum(not work.is_finished for work in started))

    def start(finish: Any) -> GatheringWork:
        started.append(GatheringWork(finish))
        return started[-1]

    for block in model.blocks:
        block.get_submodule("qkv").register_forward_pre_hook(enter)
    with mock.patch.object(gather_hook, "GatheringWork", start):
        result = train(model)
    return result, under_way


@pytest.mark.parametrize(("gather", "hops"), [("twice", "flat"), ("once", "two-hop")])
def test_gathering_ahead_changes_no_number(run: Run, gather: str, hops: str) -> None:
    for (found, under_way), (expected, none_under_way) in zip(
        run(4, _ahead, True, gather, hops), run(4, _ahead, False, gather, "flat"), strict=True
    ):
        assert max(under_way) == 1
        assert max(none_under_way) == 0
        if hops == "flat":
            assert_same_run(found, expected)
        else:
            assert found[0][0] == expected[0][0]  # the forward pass comes before any reduce
