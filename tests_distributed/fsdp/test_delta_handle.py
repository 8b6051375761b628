"""The handle of a wire that sends changes: what it reports, keeps, refuses, loads and removes."""

from __future__ import annotations

import gc
import json
import math
import random
import re
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

import qsdp
from tests.support.growth import grown_since, held
from tests_distributed.support.delta import (
    decoded,
    installed,
    masks_of,
    num_buckets,
    other_weights,
    prune,
    same_on_all_ranks,
    sent_while,
    support,
    take_sgd_step,
    wide,
)
from tests_distributed.support.helpers import full_state, make_batch, make_model, shard
from tests_distributed.support.interruptions import Fault, hooked
from tests_distributed.support.running import Run
from tests_distributed.support.training import State
from tests_distributed.support.trainings import Case, simulation_of

CONFIG: dict[str, Any] = {"weight_bits": 4, "grad_bits": 4, "delta_redraw_every": 3}


def _reported() -> tuple[list[str], int, int]:
    """The remarks, what the handle keeps, and what codes, grids and raw values take at least."""
    model, handle = wide(1, {**CONFIG, "embedding_bits": 4})
    take_sgd_step(model, 0, 0.1)
    ranks, least = dist.get_world_size(), 0
    for row in handle.report().rows:
        rows, *rest = row.shape
        numel = -(-rows // ranks) * math.prod(rest)
        least += numel // 2 + 12 * -(-numel // 128) if row.weight == "4 bits" else 4 * numel
    return [*handle.report().remarks], handle.kept_bytes, ranks * least


def test_the_report_and_the_handle_say_what_kept_codes_take(run: Run) -> None:
    for remarks, kept, least in run(2, _reported):
        assert least <= kept <= 1.02 * least + 2 * 3 * 256
        (number,) = [
            re.search(r"([\d,.]+) bytes", remark) for remark in remarks if "bytes" in remark
        ]
        assert number
        assert number.string.startswith("gather delta")
        assert int(number[1].replace(",", "")) == kept


# --- removal ------------------------------------------------------------------------------------


def _removed() -> tuple[list[str], list[float], list[float]]:
    """What is alive after ``remove`` and a drop, and losses on another wire put on the model."""
    model, handle = installed(2, CONFIG)
    for step in range(2):
        take_sgd_step(model, step, 0.1)
    rows = weakref.ref(handle)
    handle.remove()
    with pytest.raises(RuntimeError, match="removed"):
        _ = handle.kept_bytes
    del handle
    gc.collect()
    alive = [] if rows() is None else ["handle"]
    state = full_state(model)
    again = qsdp.install(model, qsdp.QSDPConfig(gather="delta", **CONFIG))
    losses = [take_sgd_step(model, step, 0.1) for step in range(2, 4)]
    again.remove()
    other = make_model(3)
    other.load_state_dict(state)
    handle = qsdp.install(shard(other), qsdp.QSDPConfig(gather="delta", **CONFIG))
    expected = [take_sgd_step(other, step, 0.1) for step in range(2, 4)]
    both = {"model": weakref.ref(model), "other": weakref.ref(other), "wire": weakref.ref(handle)}
    del model, other, handle, again
    gc.collect()
    alive += [name for name, thing in both.items() if thing() is not None]
    return alive, losses, expected


def test_a_removed_wire_is_freed_and_a_new_one_starts_anew(run: Run) -> None:
    for alive, losses, expected in run(2, _removed):
        assert alive == []
        assert losses == expected


# --- what grows --------------------------------------------------------------------------------


def _round(model: Any, handle: qsdp.Handle) -> None:
    """Steps beside which everything happens that can, and which end as they began."""
    state = handle.state_dict()
    for step in range(5):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(step % 2 == 0 or "mlp" in name)
        take_sgd_step(model, step, 0.1)
        with torch.no_grad():
            model(*make_batch(model, 50))
        with handle.exact(), torch.inference_mode():
            model(*make_batch(model, 51))
        masks = masks_of(model, 0.5, seed=step)
        with handle.aside(), other_weights(model):
            prune(model, masks)
            handle.set_support(support(model, masks))
            model(*make_batch(model, 53)).backward()
            handle.set_support(None)
    prune(model, masks)
    handle.set_support(support(model, masks))
    take_sgd_step(model, 5, 0.0)
    handle.set_support(None)
    with hooked(model, "forward"), pytest.raises(Fault):
        model(*make_batch(model, 52))
    handle.abandon_step()
    model.blocks[0].unshard(async_op=True)
    grids = handle.grids()
    handle.load_state_dict(state)
    with pytest.raises(ValueError, match="the clock is at step"):
        handle.load_grids(grids)  # which are later
    handle.load_grids(handle.grids())


def _grown() -> dict[str, tuple[int, int]]:
    model, handle = installed(2, {**CONFIG, "weight_bucket_size": 16})
    for _ in range(2):
        _round(model, handle)
    before = held()
    for _ in range(2):
        _round(model, handle)
    return grown_since(before)


def test_nothing_that_is_kept_grows(run: Run) -> None:
    assert run(2, _grown) == [{}, {}]


# --- states -------------------------------------------------------------------------------------


def _loaded(seed: int, other_seed: bool) -> tuple[State, State, dict[str, int], int, list[bool]]:
    """After a state is loaded: weights as decoded, exact ones, counts of the first gather."""
    model, handle = installed(seed, {**CONFIG, "bucket_size": 64, "seed": seed})
    for step in range(4):
        take_sgd_step(model, step, 0.1)
    state = json.loads(json.dumps(handle.state_dict()))
    for step in range(4, 6):
        take_sgd_step(model, step, 0.1)
    handle.load_state_dict(state | {"seed": seed + other_seed})
    exact, found = full_state(model), {}
    counts = sent_while(handle, lambda: found.update(decoded(model)))
    same = [same_on_all_ranks(found)]
    for step in range(6, 9):
        take_sgd_step(model, step, 0.1)
        same.append(same_on_all_ranks(decoded(model)))
    return found, exact, counts, num_buckets(model, 64, dist.get_world_size()), same


def _drawn_anew(case: Case, seed: int, exact: State) -> State:
    """What a simulation whose first gather is in step 4 decodes."""
    simulation = simulation_of(case, seed)
    for name, value in exact.items():
        rows = value.chunk(case.ranks)
        for rank, shards in enumerate(simulation.shards):
            part = rows[rank] if rank < len(rows) else value[:0]
            shards[name].data.copy_(part.reshape(shards[name].shape))
    simulation.clock = 4
    return simulation.weights()


@pytest.mark.parametrize("other_seed", [False, True])
def test_all_ranks_draw_anew_alike_after_a_state_is_loaded(run: Run, other_seed: bool) -> None:
    seed = random.randrange(1 << 30)
    everyone = run(3, _loaded, seed, other_seed)
    case = Case(ranks=3, config={"gather": "delta", **CONFIG})
    (expected,) = run(1, _drawn_anew, case, seed + other_seed, everyone[0][1])
    for found, _, counts, buckets, same in everyone:
        assert all(same)
        assert counts["redrawn_buckets"] == buckets
        assert counts["changed_codes"] == 0
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


# --- refusals -----------------------------------------------------------------------------------


def _disagreement(odd: int, config: dict[str, Any]) -> str:
    own = {**CONFIG, **(config if dist.get_rank() == odd else {})}
    with pytest.raises(RuntimeError) as raised:
        qsdp.install(shard(make_model()), qsdp.QSDPConfig(**{"gather": "delta", **own}))
    return str(raised.value)


@pytest.mark.parametrize(
    "config",
    [{"delta_room": 0.5}, {"delta_redraw_every": 4}, {"weight_bucket_size": 64}, {"seed": 1}],
    ids=str,
)
def test_ranks_that_disagree_are_refused(run: Run, config: dict[str, Any]) -> None:
    odd = random.randrange(2)
    for sentence in run(2, _disagreement, odd, config):
        assert "every rank" in sentence
        assert "\n" not in sentence


# --- one rank -----------------------------------------------------------------------------------


def _alone() -> tuple[State, State, int]:
    model, handle = installed(6, CONFIG)
    torch.autograd.backward(model(*make_batch(model, 0)))
    sent = handle.traffic.snapshot()["gather_sent_bytes"]
    return decoded(model), full_state(model), sent


def test_one_rank_computes_with_its_own_weights(run: Run) -> None:
    ((found, exact, sent),) = run(1, _alone)
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    assert sent == 0


def _counters_at_first() -> dict[str, int]:
    return installed(6, CONFIG)[1].traffic.snapshot()


@pytest.mark.parametrize("ranks", [1, 2])
def test_there_are_counters_before_anything_was_sent(run: Run, ranks: int) -> None:
    for counts in run(ranks, _counters_at_first):
        assert counts["changed_codes"] == counts["redrawn_buckets"] == 0
