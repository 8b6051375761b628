"""When the simulated ranks leave their grids alone, and when whole groups draw them anew."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import qsdp
from tests.support.simulated import (
    Net,
    Resting,
    assert_same,
    batches,
    epochs,
    grids,
    rate,
    rest,
    run,
    simulation,
)

DELTA: dict[str, Any] = {"weight_bits": 4, "gather": "delta", "bucket_size": 8}
BLOCK, ROOT = "block.0.weight", "embed.weight"
"""A parameter of each group."""


def frozen() -> Net:
    model = Net()
    model.block[2].weight.requires_grad_(False)
    return model


def as_gathered_once(simulated: qsdp.Simulation, step: int, **config: Any) -> dict[str, Tensor]:
    """What fresh gathers with ``gather="once"`` bring of its weights in ``step``."""
    fresh = simulation({**DELTA, "rounding": "dither", **config, "gather": "once"}, frozen())
    for own, other in zip(fresh.shards, simulated.shards, strict=True):
        for name, shard in own.items():
            shard.data.copy_(other[name].data)
    fresh.clock = step
    return fresh.weights()


def assert_same_grids(left: qsdp.Simulation, right: qsdp.Simulation) -> None:
    kept, others = grids(left), grids(right)
    assert kept.keys() == others.keys()
    for place, own in kept.items():
        assert all(map(torch.equal, own, others[place])), place


def random_mask(name: str) -> dict[str, Tensor]:
    shapes = {own: p.shape for own, p in Net().named_parameters()}
    return {name: torch.rand(shapes[name]) < 0.4}


@torch.no_grad()
def prune(simulated: qsdp.Simulation, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        for shards, keep in zip(simulated.shards, mask.chunk(4), strict=True):
            shards[name].masked_fill_(~keep, 0)


def assert_on_buckets(simulated: qsdp.Simulation, name: str, masks: dict[str, Tensor]) -> None:
    """Every eight values of each rank that ``masks`` keep share a grid."""
    whole = torch.ones(simulated.state()[name].shape, dtype=torch.bool)
    for rank, own in enumerate(masks.get(name, whole).chunk(4)):
        assert grids(simulated)[name, rank].low.numel() == -(-int(own.sum()) // 8)


def test_weights_aside_are_those_of_fresh_gathers_and_leave_no_trace() -> None:
    config = {**DELTA, "delta_redraw_every": 3, "seed": random.randrange(1 << 60)}
    with_it, without = simulation(config, frozen()), simulation(config, frozen())
    for step in range(6):
        with with_it.aside():
            found = with_it.weights()
            with with_it.aside():
                pass
            assert_same(with_it.weights(), found)
        assert_same(found, as_gathered_once(with_it, step, seed=config["seed"]))
        if step:
            assert not torch.equal(found[BLOCK], with_it.weights()[BLOCK])
        for simulated in (with_it, without):
            simulated.step(batches(step, 4))
    assert_same(with_it.state(), without.state())
    assert_same_grids(with_it, without)


@pytest.mark.parametrize("gather", ["twice", "once"])
def test_without_kept_codes_nothing_is_aside(gather: str) -> None:
    inside, outside = simulation({"gather": gather}), simulation({"gather": gather})
    with inside.aside():
        run(inside)
    assert_same(inside.state(), run(outside))


def test_a_second_pass_aside_takes_a_step_and_draws_no_grid() -> None:
    simulated = simulation({**DELTA, "delta_redraw_every": 1, "rounding": "dither"}, frozen())
    for step in range(4):
        simulated.pass_(batches(step, 4))
        before = [{n: p.detach().clone() for n, p in own.items()} for own in simulated.shards]
        masks = random_mask(BLOCK)
        with simulated.aside():
            prune(simulated, masks)
            if step % 2:
                simulated.set_support(masks)
                assert_same(simulated.weights(), simulated.weights())
                assert not simulated.weights()[BLOCK][~masks[BLOCK]].any()
            simulated.pass_(batches(step + 10, 4))
            simulated.set_support(None)
        for own, was in zip(simulated.shards, before, strict=True):
            for name, shard in own.items():
                shard.data.copy_(was[name])
        simulated.update()
        assert simulated.clock == 2 * step + 1
        assert epochs(simulated, ROOT).eq(2 * step).all()
    assert not epochs(simulated, "block.2.weight").any()  # a frozen one, of the same group


def test_a_group_draws_its_grids_anew_where_its_support_changes() -> None:
    simulated = simulation(DELTA, optimizer=rate(0.0))
    drawn = {BLOCK: 0, ROOT: 0}
    block, root = random_mask(BLOCK), random_mask(ROOT)
    changes = {1: block, 3: random_mask(BLOCK) | root, 4: root, 6: None, 7: block, 8: block, 9: {}}
    masks: dict[str, Tensor] = {}
    for step in range(11):
        if step in changes:
            before, masks = masks, changes[step] or {}
            prune(simulated, masks)
            simulated.set_support(changes[step])
            others = [
                name
                for name in before | masks
                if name not in before.keys() & masks.keys()
                or not torch.equal(before[name], masks[name])
            ]
            drawn |= dict.fromkeys(others, step)
        simulated.step(batches(step, 4))
        for name, epoch in drawn.items():
            assert epochs(simulated, name).eq(epoch).all(), (step, name)
            assert_on_buckets(simulated, name, masks)
        # Of a parameter without a mask in a group with one, too.
        assert epochs(simulated, "block.2.weight").eq(drawn[BLOCK]).all()


def test_kept_weights_are_on_grids_of_their_own_and_all_others_are_zero() -> None:
    simulated = simulation({**DELTA, "weight_bits": 8})
    masks = random_mask(BLOCK)
    masks[BLOCK][:5] = False  # all of the first rank's
    prune(simulated, masks)
    simulated.set_support(masks)
    for step in range(3):
        decoded, exact = simulated.weights()[BLOCK], simulated.state()[BLOCK]
        assert torch.equal(decoded == 0, ~masks[BLOCK])
        assert not decoded.signbit()[~masks[BLOCK]].any()
        kept = exact[masks[BLOCK]]
        torch.testing.assert_close(decoded[masks[BLOCK]], kept, rtol=0, atol=0.01)
        simulated.step(batches(step, 4))
        assert not simulated.state()[BLOCK][~masks[BLOCK]].any()
    assert (BLOCK, 0) not in grids(simulated)


def test_a_support_of_a_resting_group_is_heeded_when_it_is_gathered_again() -> None:
    simulated = simulation(DELTA, Resting(), optimizer=rate(0.0))
    masks, found = random_mask(BLOCK), []
    for step, (is_used, given) in enumerate(
        [(True, None), (False, masks), (False, None), (True, None), (False, masks), (True, masks)]
    ):
        prune(simulated, masks if is_used and given else {})
        simulated.set_support(given)
        rest(simulated, step, is_used)
        found.append(set(epochs(simulated, BLOCK).tolist()))
    # What was masked while it rested alone was never sent so.
    assert found == [{0}, {0}, {0}, {0}, {0}, {5}]
    assert_on_buckets(simulated, BLOCK, masks)


@pytest.mark.parametrize("bits", [None, 16, 8])
def test_weights_travel_fresh_through_the_warm_up_and_are_all_drawn_behind_it(bits: Any) -> None:
    config = {**DELTA, "warmup_steps": 2, "warmup_bits": bits, "rounding": "dither"}
    simulated = simulation(config, frozen(), optimizer=rate(0.01))
    for step in range(4):
        found = simulated.weights()
        fresh = as_gathered_once(simulated, step, warmup_steps=2, warmup_bits=bits)
        if step < 2:
            assert_same(found, fresh)
            assert grids(simulated) == {}
        else:
            assert not torch.equal(found[BLOCK], fresh[BLOCK])
        simulated.step(batches(step, 4))
    assert {*torch.cat([own.epoch for own in grids(simulated).values()]).tolist()} == {2}


def test_groups_whose_bits_a_budget_changes_are_drawn_anew_and_others_are_not() -> None:
    sizes = {"weight_bits": 3, "bucket_size": 64, "budget": 7.5}
    config = {**DELTA, **sizes, "policy": (("block.*.weight", 4),)}
    simulated = simulation(config, optimizer=rate(0.0))
    for step in range(4):
        before, names = simulated._wire._bits, (ROOT, "out.weight")
        simulated.step(batches(step, 4))
        now = simulated._wire._bits
        assert any(before[name][0] != now[name][0] for name in names) == (step == 1)
        assert epochs(simulated, ROOT).eq(min(step, 1)).all()
        assert epochs(simulated, BLOCK).eq(0).all()


def test_all_replicas_have_the_grids_of_one_shard_group() -> None:
    one, two = (
        simulation({**DELTA, "delta_redraw_every": 2}, optimizer=rate(0.0), replicas=replicas)
        for replicas in (1, 2)
    )
    for step in range(3):
        one.step(batches(step, 4))
        two.step(batches(step, 8))
    assert_same_grids(one, two)
    assert_same(one.weights(), two.weights())
    assert sorted({rank for _, rank in grids(two)}) == [0, 1, 2, 3]
