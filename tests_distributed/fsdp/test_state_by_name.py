"""What a handle keeps for a resumed run goes to the parameters of its names, or is refused."""

from __future__ import annotations

import copy
import json
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qsdp
from tests_distributed.support.helpers import Toy, make_batch, make_model, shard
from tests_distributed.support.running import Run

CONFIG = qsdp.QSDPConfig(
    bucket_size=64, budget=5.0, weight_bits=4, grad_bits=4, levels="learned", level_steps=(1, 3)
)


def _trained(model: Toy, steps: int = 2, config: qsdp.QSDPConfig = CONFIG) -> qsdp.Handle:
    handle = qsdp.install(shard(model), config)
    for step in range(steps):
        model(*make_batch(model, step)).backward()
        model.zero_grad()
    return handle


def _of_names(handle: qsdp.Handle) -> Any:
    """Bits, and all levels, by name."""
    bits = {row.name: (row.weight, row.grad, row.why) for row in handle.report().rows}
    levels = {tuple(row[:3]): row[3:] for row in handle.state_dict()["levels"]}
    return bits, levels


def _reordered(seed: int = 0) -> Toy:
    """The same model with its modules registered the other way round."""
    model = make_model(seed)
    for module in (model, *model.blocks):
        for name in reversed([*module._modules]):
            module._modules[name] = module._modules.pop(name)
    return model


def _taken_by_name() -> Any:
    handle = _trained(make_model())
    state = json.loads(json.dumps(handle.state_dict()))
    other = qsdp.install(shard(_reordered()), CONFIG)
    other.load_state_dict(state)
    return _of_names(handle), _of_names(other)


def test_a_model_in_another_order_takes_its_own_bits_and_levels(run: Run) -> None:
    for found, expected in run(2, _taken_by_name):
        assert found == expected
        bits, levels = found
        assert len(set(bits.values())) > 3
        assert len({tuple(row) for row in levels.values()}) > 5


def _back_to_the_start() -> Any:
    model = make_model()
    handle = _trained(model, steps=0)
    start = handle.state_dict()
    for step in range(2):
        model(*make_batch(model, step)).backward()
    learned = len(handle.state_dict()["levels"])
    handle.load_state_dict(start)
    return learned, start, handle.state_dict()


def test_a_state_without_levels_lays_those_aside_that_were_learned_since(run: Run) -> None:
    for learned, start, back in run(2, _back_to_the_start):
        assert learned > 5
        assert not start["levels"]
        assert back == start


def _change(state: dict[str, Any], what: str) -> None:
    """As it would be from another model, or from an earlier version."""
    name = "blocks.0.qkv.weight"
    if what == "unknown parameter":
        state["parameters"]["blocks.0.extra.weight"] = [3, 10]
    elif what == "missing parameter":
        del state["parameters"][name]
    elif what == "another shape":
        state["parameters"]["head.weight"] = [50, 10]
    elif what == "unknown bits":
        state["bits"]["blocks.0.extra.weight"] = [4, 4]
    elif what == "missing bits":
        del state["bits"][name]
    elif what == "bits of a norm":
        state["bits"]["norm.weight"] = [4, 4]
    elif what == "unknown levels":
        state["levels"][0][0] = "blocks.0.extra.weight"
    elif what == "levels of another length":
        state["levels"][0].append(1.0)
    elif what == "levels of another direction":
        state["levels"][0][1] = "sideways"
    else:
        assert what == "by number"
        del state["parameters"]
        state["bits"] = [[i, *both] for i, both in enumerate(state["bits"].values())]
        state["levels"] = [[i, *row[2:]] for i, row in enumerate(state["levels"])]


REFUSED = {
    "unknown parameter": "blocks.0.extra.weight is [3, 10] there and missing here, the first of 1",
    "missing parameter": "blocks.0.qkv.weight is unknown there and [30, 10] here",
    "another shape": "head.weight is [50, 10] there and [13, 10] here",
    "unknown bits": "blocks.0.extra.weight is unknown there and missing here",
    "missing bits": "the state has no bits for blocks.0.qkv.weight, the first of 1",
    "bits of a norm": "the state has bits for norm.weight, the first of 1",
    "unknown levels": "blocks.0.extra.weight is unknown there and missing here",
    "levels of another length": "the state has 17 levels for",
    "levels of another direction": "sideways of 4 bits",
    "by number": "by the numbers of parameters, as earlier versions of qsdp wrote them",
}


def _refused() -> dict[str, Any]:
    handle = _trained(make_model())
    state = json.loads(json.dumps(handle.state_dict()))
    other = qsdp.install(shard(make_model()), CONFIG)
    before, said = other.state_dict(), {}
    for what in REFUSED:
        changed = copy.deepcopy(state)
        _change(changed, what)
        with pytest.raises(ValueError) as caught:
            other.load_state_dict(changed)
        assert other.state_dict() == before, what
        said[what] = str(caught.value)
        # What the sentence advises, if not what was there.
        other.load_state_dict(changed | {"bits": {}, "levels": []})
        assert other.state_dict()["step"] == state["step"]
        other.load_state_dict(before)
    other.load_state_dict(state)
    assert other.state_dict() == state
    return said


def test_what_is_of_another_model_is_refused_in_one_sentence_and_nothing_is_loaded(
    run: Run,
) -> None:
    for said in run(2, _refused):
        for what, words in REFUSED.items():
            assert words in said[what]
            assert "\n" not in said[what]


NAME = "blocks.0.qkv.weight"


def _with(value: Any, *path: Any) -> Callable[[dict[str, Any]], object]:
    """Set an entry of a state."""

    def damage(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return damage


def _lowered(state: dict[str, Any]) -> None:
    row = state["levels"][0]
    row[4], row[5] = row[5] + 0.01, row[4]


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **{
        f"no {key}": (operator.methodcaller("pop", key), f"the state lacks {key}: give all that")
        for key in ("seed", "step", "reduced", "request", "bits", "levels")
    },
    **{
        f"bits {bits}": (_with(bits, "bits", NAME), f"bits of {NAME} are {bits!r}: give [2 to 8, 2")
        for bits in ([99, 4], [0, 4], [4, 1], [16, 4], [4.7, 4], ["a", "b"], [True, 4], [4], None)
    },
    "bits by number": (_with([[NAME, 4, 4]], "bits"), "the state's bits are [['blocks.0.qkv"),
    "bits of a number": (_with(7, "bits"), "the state's bits is 7: give a dict by name"),
    "bits of nothing": (_with(None, "bits"), "the state's bits is None"),
    "levels by name": (_with({"a": 1}, "levels"), "the state's levels is {'a': 1}: give a list"),
    "a row of nothing": (_with([], "levels", 0), "the state has [] among its levels: give rows"),
    "a row of a number": (_with(3, "levels", 0), "the state has 3 among its levels"),
    "a row cut short": (_with([NAME, "grad"], "levels", 0), "'grad'] among its levels"),
    "a name that is a list": (_with([NAME], "levels", 0, 0), "levels for ['blocks"),
    "a kind that is a list": (_with(["grad"], "levels", 0, 1), "levels for"),
    "bits of a row in words": (_with("4", "levels", 0, 2), "levels for"),
    "a level in words": (_with("x", "levels", 0, 5), ": give numbers from 0 to 1 in ascending"),
    "a level that is NaN": (_with(math.nan, "levels", 0, 5), ": give numbers from 0 to 1 in asc"),
    "a level above 1": (_with(5.0, "levels", 0, 5), ": give numbers from 0 to 1 in ascending"),
    "a last level of infinity": (_with(math.inf, "levels", 0, -1), ": give numbers from 0 to 1"),
    "levels in another order": (_lowered, ": give numbers from 0 to 1 in ascending order"),
    "a row twice": (
        lambda state: state["levels"].append(state["levels"][0]),
        "twice: give them once",
    ),
    "a step in words": (_with("abc", "step"), "the state's step is 'abc': give a whole number"),
    "a broken step": (_with(1.5, "step"), "the state's step is 1.5: give a whole number"),
    "a negative step": (_with(-1, "step"), "the state's step is -1: give a whole number from 0"),
    "a negative seed": (_with(-3, "seed"), "the state's seed is -3: give a whole number from 0"),
    "reduced twice": (_with(2, "reduced"), "the state's reduced is 2: give 0 or 1"),
    "parameters in a list": (_with([1], "parameters"), "the state's parameters is [1]: give a"),
    "a request in words": (_with("8 bits", "request"), "the state's request is '8 bits': give a"),
}


def _refuses_damage() -> dict[str, str]:
    handle = _trained(make_model())
    state = json.loads(json.dumps(handle.state_dict()))
    other = _trained(make_model(1), steps=3)
    before, said = other.state_dict(), {}
    for what, (damage, _) in DAMAGED.items():
        damaged = copy.deepcopy(state)
        damage(damaged)
        with pytest.raises(ValueError) as caught:
            other.load_state_dict(damaged)
        assert other.state_dict() == before, what
        said[what] = str(caught.value)
    with pytest.raises(ValueError, match="the state is a list: give the dict"):
        other.load_state_dict([state])  # type: ignore[arg-type]
    other.load_state_dict(state)
    assert other.state_dict() == state
    return said


def test_a_damaged_state_is_refused_in_one_sentence_and_nothing_is_loaded(run: Run) -> None:
    for said in run(2, _refuses_damage):
        for what, (_, words) in DAMAGED.items():
            assert words in said[what], what
            assert "\n" not in said[what]


def _not_asked_for() -> None:
    """Bits of another request and levels that are not learned here go to nobody."""
    state = _trained(make_model()).state_dict()
    del state["parameters"]
    handle = qsdp.install(shard(make_model()), qsdp.QSDPConfig(budget=6.0))
    handle.load_state_dict(state)
    assert not handle.state_dict()["bits"]


def test_a_state_is_compared_only_where_something_of_it_is_taken_over(run: Run) -> None:
    run(2, _not_asked_for)


def _wrapped() -> Any:
    state = _trained(make_model()).state_dict()
    model = make_model()
    model.blocks = nn.ModuleList(torch.compile(block) for block in model.blocks)  # type: ignore[misc]
    handle = qsdp.install(shard(model), CONFIG)
    handle.load_state_dict(state)
    return state, handle.state_dict()


def test_names_are_those_without_wrappers(run: Run) -> None:
    for state, found in run(2, _wrapped):
        assert found == state
