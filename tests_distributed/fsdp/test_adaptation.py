"""Warm-up, budgets and learned levels: what each promises beside its numbers.

tests_distributed/simulation/test_combinations.py compares the numbers with the simulation.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

import qsdp
from tests_distributed.support.helpers import (
    full_grads,
    full_state,
    make_batch,
    make_model,
    shard,
    wire_config,
)
from tests_distributed.support.running import Run
from tests_distributed.support.training import assert_same_run, train


def _warmed_up(config: dict[str, Any]) -> Any:
    model = shard(make_model())
    handle = qsdp.install(model, wire_config(16, **config))
    sent = [0]
    for step in range(3):
        train(model, steps=1, first=step)
        counts = handle.traffic.snapshot()
        sent.append(counts["gather_sent_bytes"] + counts["reduce_sent_bytes"])
    return [b - a for a, b in pairwise(sent)]


def test_a_warm_up_sends_its_bits_for_its_steps(run: Run) -> None:
    (full,) = {tuple(r) for r in run(2, _warmed_up, {"weight_bits": 32, "grad_bits": 32})}
    (four,) = {tuple(r) for r in run(2, _warmed_up, {"weight_bits": 4, "grad_bits": 4})}
    config = {"weight_bits": 4, "grad_bits": 4, "warmup_steps": 2}
    for warmed in run(2, _warmed_up, config):
        assert warmed == [full[0], full[1], four[2]]


def _adapted(options: dict[str, Any], interrupt: int | None) -> Any:
    config = qsdp.QSDPConfig(bucket_size=64, **options)
    torch.manual_seed(0)
    model = shard(make_model())
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.mul_(1.0 + i % 3)
    handle = qsdp.install(model, config)
    results = []
    for step in range(5):
        if step == interrupt:
            state = handle.state_dict()
            weights = full_state(model)
            handle.remove()
            model = make_model()
            cast(nn.Module, model).load_state_dict(weights, strict=False)
            handle = qsdp.install(shard(model), config)
            handle.load_state_dict(state)
        loss = model(*make_batch(model, step))
        loss.backward()
        results.append(float(loss))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.1)
                p.grad = None
    return (
        (results, full_state(model)),
        [(row.name, row.shape, row.weight, row.grad) for row in handle.report().rows],
        handle.state_dict(),
    )


def _bits_a_value(rows: list[Any], column: int, ranks: int) -> float:
    """Bits of coded weights (column 2) or gradients (3) on the wire, over their values.

    Buckets are of 64, shards padded.
    """
    total = values = 0
    for row in rows:
        if "bits" in row[column]:
            padded = -(-row[1][0] // ranks) * math.prod(row[1][1:])
            coded = 8 * -(-padded * int(row[column].split()[0]) // 8)
            total += ranks * (coded + 64 * -(-padded // 64))
            values += math.prod(row[1])
    return total / values if values else 0.0


@pytest.mark.parametrize(
    ("ranks", "budget"),
    [(2, 4.5), (3, 5.0), pytest.param(4, 6.0, marks=pytest.mark.heavy)],
)
def test_what_travels_is_within_the_budget(run: Run, ranks: int, budget: float) -> None:
    for _, rows, _ in run(ranks, _adapted, {"budget": budget}, None):
        for column in (2, 3):
            assert budget - 0.5 < _bits_a_value(rows, column, ranks) <= budget


def test_a_budget_is_kept_and_survives_interruptions_at_any_step(run: Run) -> None:
    options = {"budget": 5.0, "warmup_steps": 1, "warmup_bits": 16}
    expected = run(2, _adapted, options, None)
    rows = expected[0][1]
    assert expected[1][1] == rows
    for column in (2, 3):
        # Errors differ, so do bits.
        assert len({row[column] for row in rows if "bits" in row[column]}) > 1
    for step in (1, 2, 3):
        for (found, found_rows, _), (wanted, _, _) in zip(
            run(2, _adapted, options, step), expected, strict=True
        ):
            assert_same_run(found, wanted)
            assert found_rows == rows


def test_a_budget_of_gradients_leaves_weights_their_bits(run: Run) -> None:
    options = {"grad_budget": 4.5, "weight_bits": 5}
    for _, rows, state in run(2, _adapted, options, None):
        assert {row[2] for row in rows if len(row[1]) > 1} == {"5 bits", "8 bits"}
        assert 4.0 < _bits_a_value(rows, 3, 2) <= 4.5
        assert len({row[3] for row in rows if "bits" in row[3]}) > 1
        assert {weight for weight, _ in state["bits"].values()} == {5, 8}


@pytest.mark.parametrize("options", [{"weight_bits": 32}, {"grad_bits": 16}], ids=str)
def test_a_direction_without_codes_takes_no_budget(run: Run, options: dict[str, Any]) -> None:
    raw = 2 if "weight_bits" in options else 3
    for _, rows, _ in run(2, _adapted, {**options, "budget": 5.0}, None):
        assert not any("bits" in row[raw] for row in rows)
        assert 4.5 < _bits_a_value(rows, 5 - raw, 2) <= 5.0


def test_bits_of_choice_stay_and_count(run: Run) -> None:
    options = {"budget": 7.5, "embedding_bits": 7, "policy": (("*.qkv.weight", (3, 16)),)}
    for _, rows, _ in run(2, _adapted, options, None):
        for name, _, weight, grad in rows:
            if name.endswith("qkv.weight"):
                assert (weight, grad) == ("3 bits", "bfloat16")
            if name.startswith(("embed", "position", "head")):
                assert (weight, grad) == ("7 bits", "7 bits")
        for column in (2, 3):
            assert 7.0 < _bits_a_value(rows, column, 2) <= 7.5
            assert len({row[column] for row in rows if "bits" in row[column]}) > 2


OVERFLOWS = {(0, 1), (1, 0)}
"""(Step, rank) of gradients that are infinite or NaN."""


def _overflowed() -> Any:
    """As under a GradScaler: steps with such gradients are skipped."""
    model = shard(make_model())
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=64, budget=5.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step in range(5):
        scale = math.inf if (step, dist.get_rank()) in OVERFLOWS else 1.0
        torch.autograd.backward(model(*make_batch(model, step)) * scale)
        seen.append(full_grads(model))
        if step > 1:
            optimizer.step()
        optimizer.zero_grad()
    return seen, [(row.why, row.grad) for row in handle.report().rows]


def _overflowed_in_one_process() -> Any:
    scales = [math.inf if (s, r) in OVERFLOWS else 1.0 for s in range(5) for r in range(2)]
    model = make_model()
    simulation = qsdp.simulate(
        model,
        qsdp.QSDPConfig(bucket_size=64, budget=5.0),
        world_size=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        groups=[f"blocks.{i}{part}" for i in range(2) for part in (".mlp", "")],
        loss=lambda loss: loss * scales.pop(0),
    )
    seen = []
    for step in range(5):
        simulation.pass_([[make_batch(model, step, rank) for rank in range(2)]])
        seen.append(simulation.grads())
        for optimizer in simulation.optimizers:
            if step > 1:
                optimizer.step()
            optimizer.zero_grad()
    return seen


def test_errors_that_are_not_finite_are_measured_again(run: Run) -> None:
    (expected,) = run(1, _overflowed_in_one_process)
    for grads, rows in run(2, _overflowed):
        allotted = {grad for why, grad in rows if why == "budget"}
        assert len(allotted) > 1
        for found, simulated in zip(grads[2:], expected[2:], strict=True):
            assert_same_run(([], found), ([], simulated))
        assert not all(grad.isfinite().all() for grad in grads[1].values())


Rows = list[tuple[str, str, str]]


def _asked_anew(before: dict[str, Any], after: dict[str, Any], forgets: bool) -> list[Rows]:
    """How parameters travel under ``before``, then under ``after`` when its state is loaded.

    Then two steps later; at last under ``before`` with the state from its beginning.
    """
    found = []

    def note(handle: qsdp.Handle) -> None:
        found.append([(row.weight, row.grad, row.why) for row in handle.report().rows])

    model = shard(make_model())
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=64, **before))
    start = handle.state_dict()
    train(model)
    state = handle.state_dict()
    assert json.loads(json.dumps(state)) == state
    if forgets:
        state["request"] = {}
    note(handle)
    handle.load_state_dict(start)
    back = handle
    model = shard(make_model())
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=64, **after))
    handle.load_state_dict(state)
    note(handle)
    train(model, steps=2)
    note(handle)
    note(back)
    note(qsdp.install(shard(make_model()), qsdp.QSDPConfig(bucket_size=64, **after)))
    return found


SIX = {"budget": 6.0}
SIX_OF_GRADS = {"grad_budget": 6.0}
POLICY: dict[str, Any] = {"policy": (("*.qkv.weight", 4), ("*.up.weight", (5, 6)))}


@pytest.mark.parametrize(
    ("before", "after", "forgets"),
    [
        (SIX, {}, False),
        pytest.param(SIX, {"weight_bits": 4}, False, marks=pytest.mark.heavy),
        ({}, SIX, False),
        (SIX, {"budget": 7.0}, False),
        pytest.param(SIX, {**SIX, "grad_bits": 6}, False, marks=pytest.mark.heavy),
        pytest.param(SIX, SIX_OF_GRADS, False, marks=pytest.mark.heavy),
        pytest.param(SIX_OF_GRADS, SIX_OF_GRADS, False, marks=pytest.mark.heavy),
        pytest.param(SIX_OF_GRADS, {"grad_budget": 5.0}, False, marks=pytest.mark.heavy),
        pytest.param(SIX, {**SIX, "embedding_bits": 4}, False, marks=pytest.mark.heavy),
        (SIX, {**SIX, **POLICY}, False),
        (SIX, SIX, True),
        ({**SIX, **POLICY}, {**SIX, **POLICY}, False),
    ],
    ids=str,
)
def test_allotted_bits_are_taken_over_for_the_same_request_alone(
    run: Run, before: dict[str, Any], after: dict[str, Any], forgets: bool
) -> None:
    was_allotted, is_allotted = (
        not each.keys().isdisjoint(SIX | SIX_OF_GRADS) for each in (before, after)
    )
    for old, loaded, later, back, fresh in run(2, _asked_anew, before, after, forgets):
        assert any(why == "budget" for *_, why in old) == was_allotted
        assert not any(why == "budget" for *_, why in back)
        if before == after and not forgets:
            assert loaded == later == old
            continue
        assert loaded == fresh
        assert any(why == "budget" for *_, why in later) == is_allotted
        if not is_allotted:
            assert later == fresh
        else:
            assert len({grad for _, grad, why in later if why == "budget"}) > 1


def test_learned_levels_are_the_same_on_all_ranks_and_survive_interruptions(run: Run) -> None:
    options = {"weight_bits": 3, "grad_bits": 4, "levels": "learned", "level_steps": (1, 3)}
    expected = run(2, _adapted, options, None)
    state = expected[0][2]
    assert expected[1][2] == state
    learned = {int(bits): levels for _, _, bits, *levels in state["levels"]}
    for bits in (3, 4):
        steps = torch.tensor(learned[bits]).diff()
        assert len(steps) == 2**bits - 1
        assert (steps >= 0).all()
        assert steps.max() > 1.3 * steps.min()  # a uniform grid has equal ones
    never = run(2, _adapted, {**options, "level_steps": (100,)}, None)
    assert never[0][0][0][0] == expected[0][0][0][0]
    assert never[0][0][0][1:] != expected[0][0][0][1:]
    for step in (2, 3):  # what was learned once; and where it is due
        for (found, _, found_state), (wanted, _, _) in zip(
            run(2, _adapted, options, step), expected, strict=True
        ):
            assert_same_run(found, wanted)
            assert found_state == state


def _with_levels(gather: str) -> Any:
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    config = qsdp.QSDPConfig(
        weight_bits=3, bucket_size=16, gather=gather, levels="learned", level_steps=(1, 2)
    )
    qsdp.install(shard(model, nested=False), config)
    losses = []
    for step in range(3):
        model.train()
        train(model, steps=1, first=step)
        with torch.no_grad():
            losses.append(float(model(*make_batch(model, 7))))
    return losses


def test_kept_payloads_of_frozen_weights_do_not_follow_the_levels(run: Run) -> None:
    once, twice = run(2, _with_levels, "once"), run(2, _with_levels, "twice")
    for found, expected in zip(once, twice, strict=True):
        # Other keys, so other rounding; decoded with other levels it would be far off.
        assert found == pytest.approx(expected, abs=0.1)
