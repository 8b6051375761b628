"""Kept grids beside passes aside and supports that change equal their simulation, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests_distributed.support.both_sides import Masks, Side, assert_both_sides_see_the_same
from tests_distributed.support.running import Run, selection
from tests_distributed.support.trainings import Case

TWO_HOPS = {"reduce": "two-hop", "ranks_per_node": 2}

BY_NODE = TWO_HOPS | {"delta_codes": "node"}


def _case(config: dict[str, Any] | None = None, **settings: Any) -> Case:
    delta = {"gather": "delta", "delta_redraw_every": 3, "weight_bits": 4, "bucket_size": 16}
    return Case(**settings, config=delta | (config or {}))


def second_passes(side: Side) -> None:
    """As CrAM takes them: with other weights for a while, under a support in every other step."""
    for step in range(4):
        side.take_pass(2 * step)
        if step == 1:
            side.look()  # a step is begun outside
        was = side.copy()
        side.move(step)
        masks = side.masks(step) if step % 2 else None
        side.prune(masks or {})
        with side.aside():
            side.set_support(masks)
            if step in (0, 3):
                side.validate(step)
            side.take_pass(2 * step + 1)
            side.set_support(None)
        side.put_back(was)
        if step == 2:
            with side.aside():
                side.look()  # after a reduce, in the step to come
        side.update()
    side.look()


def supports(side: Side) -> None:
    """Masks are set, changed, given again, lifted, and set for a part: momentum is pruned too."""
    masks: Masks = {}
    changes = {1: (0, ""), 3: (1, ""), 4: (1, ""), 5: None, 6: (2, "blocks.0.mlp"), 8: (3, "1.")}
    for step in range(9):
        if step in changes:
            change = changes[step]
            masks = {} if change is None else side.masks(change[0], part=change[1])
            side.prune(masks)
            side.set_support(masks or None, with_grads=step != 6)
        side.take_pass(step)
        side.update()
        side.prune(masks)
    side.look()


PLAYS = {"second passes": second_passes, "supports": supports}
CASES = {
    "plain": _case(options={"frozen": True}),
    "uneven": _case({"weight_bits": 8}, ranks=3, adamw=True, options={"frozen": True}),
    "empty shards, two hops": _case(TWO_HOPS, ranks=4, options={"checkpointing": True}),
    "empty shards, by node": _case(BY_NODE, ranks=4, options={"tied": True, "frozen": True}),
    "native replicas": _case(ranks=2, replicas=2, options={"tied": True, "unused": True}),
    "replicas": _case(ranks=2, replicas=2, quantized_replicas=True, options={"frozen": True}),
}
CHOSEN = {
    *(("uneven", "second passes"), ("replicas", "second passes"), ("plain", "supports")),
    ("empty shards, by node", "supports"),
}


@selection(("name", "play"), sorted(CHOSEN), tuple(CASES), tuple(PLAYS))
def test_a_play_equals_its_simulation_bit_for_bit(run: Run, name: str, play: str) -> None:
    seed = random.randrange(1 << 30)
    assert_both_sides_see_the_same(run, CASES[name], PLAYS[play], seed)


def whatever_comes(side: Side) -> None:
    """Steps in which any of all that may happen to the weights of a run does."""
    dice = random.Random(side.seed)
    masks: Masks = {}
    for step in range(10):
        if dice.random() < 0.3:
            part = dice.choice(("", "", "blocks.0.", "mlp", "qkv"))
            masks = side.masks(dice.randrange(3), part=part) if dice.random() < 0.7 else {}
            side.prune(masks)
            side.set_support(masks or None, with_grads=not masks or dice.random() < 0.5)
        if dice.random() < 0.2:
            side.move(step, only=dice.choice(("blocks.0.out", "norm1", "embed")))
            side.prune(masks)
        if dice.random() < 0.2:
            side.validate(step)
        resting = [dice.randrange(2)] if dice.random() < 0.3 else []
        side.take_pass(2 * step, resting=resting)
        if dice.random() < 0.5:
            was, inside = side.copy(), masks
            side.move(step)
            side.prune(masks)
            with side.aside():
                if dice.random() < 0.5:
                    inside = side.masks(10 + step)
                    side.prune(inside)
                    side.set_support(inside)
                if dice.random() < 0.3:
                    side.validate(step)
                side.take_pass(2 * step + 1, resting=resting)
                if inside is not masks:
                    side.set_support(masks or None)
            side.put_back(was)
        side.update()
        side.prune(masks)
    side.look()


WORLDS: dict[str, dict[str, Any]] = {
    "flat": {"ranks": 3},
    "two hops": {"ranks": 4, "config": TWO_HOPS},
    "by node": {"ranks": 4, "config": BY_NODE},
    "native replicas": {"ranks": 2, "replicas": 2},
    "replicas": {"ranks": 2, "replicas": 2, "quantized_replicas": True},
}


@pytest.mark.heavy
@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_whatever_comes_equals_its_simulation_bit_for_bit(
    run: Run, world: str, warmup_steps: int
) -> None:
    settings = dict(WORLDS[world])
    config = settings.pop("config", {}) | {"warmup_steps": warmup_steps}
    case = _case(config, options={"frozen": True}, **settings)
    assert_both_sides_see_the_same(run, case, whatever_comes, random.randrange(1 << 30))
