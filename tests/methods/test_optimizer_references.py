"""An optimizer made of a model goes by the parameters that the model has at each step.

Those that were replaced since it was made are followed into ``param_groups``, or refused by name.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from qsdp.methods.sam.optimizer import SAM
from tests.support.optimizers import (
    MASKED,
    METHODS,
    Holder,
    adamw,
    bits,
    closure_of,
    compiled,
    hand_over,
    of_every_method,
    train,
    weights,
    with_blocks,
)
from tests_distributed.support.helpers import Toy, make_model


def _assign(model: Toy) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _leave_meta(model: Toy) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(make_model(1).state_dict())


def _exchange_a_module(model: Toy) -> None:
    mlp = model.blocks[1].get_submodule("mlp")
    mlp.up = copy.deepcopy(mlp.get_submodule("up"))


WAYS: dict[str, tuple[Callable[[], Toy], Callable[[Toy], None], str]] = {
    "load_state_dict(assign=True)": (lambda: make_model(1), _assign, r"embed\.weight|blocks\."),
    "to_empty": (lambda: make_model(1).to("meta"), _leave_meta, r"embed\.weight|blocks\."),
    "another module": (lambda: make_model(1), _exchange_a_module, r"blocks\.1\.mlp\.up\."),
}


@of_every_method
@pytest.mark.parametrize("way", list(WAYS))
def test_replaced_parameters_are_refused_until_the_optimizer_has_them(
    method: str, way: str
) -> None:
    make, replace, name = WAYS[way]
    model, twin = make(), make()
    optimizer = METHODS[method](model, adamw(model))
    for each in (model, twin):
        replace(each)
    before = weights(model)
    with pytest.raises(RuntimeError, match=name):
        optimizer.step(closure_of(model, model, 0))
    assert weights(model) == before
    hand_over(optimizer, model, in_place=way == "to_empty")
    expected = train(METHODS[method](twin, adamw(twin)), twin, twin)
    assert train(optimizer, model, model) == expected
    assert weights(model) == weights(twin) != before


@of_every_method
@pytest.mark.parametrize("way", ["load_state_dict(assign=True)", "another module"])
def test_parameters_replaced_amid_training_are_refused(method: str, way: str) -> None:
    make, replace, name = WAYS[way]
    model = make()
    optimizer = METHODS[method](model, adamw(model))
    train(optimizer, model, model, range(2))
    replace(model)
    before, num_steps = weights(model), optimizer.num_steps
    with pytest.raises(RuntimeError, match=name):
        optimizer.step(closure_of(model, model, 2))
    assert weights(model) == before
    assert optimizer.num_steps == num_steps


@pytest.mark.parametrize("method", ["CrAM+", "CrAM", *MASKED])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_prunable_parameter_that_is_no_longer_there_is_named(method: str, steps: int) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, adamw(model))
    train(optimizer, model, model, range(steps))
    block: Any = model.blocks[1]
    block.projection = block.out
    del block.out
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.out\.weight"):
        optimizer.step(closure_of(model, model, steps))
    assert weights(model) == before


@of_every_method
@pytest.mark.parametrize("with_closure", [True, False])
def test_a_flat_partition_in_their_place_is_refused(method: str, with_closure: bool) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, adamw(model))
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    if not with_closure:
        flat.grad = torch.ones_like(flat)
    before, flat_before = weights(model), bits(flat)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step(closure_of(model, model, 0) if with_closure else None)
    assert "\n" not in str(caught.value)
    assert (weights(model), bits(flat)) == (before, flat_before)


WRAPS: dict[str, Callable[[Any], Any]] = {
    "held": Holder,
    "whole checkpointed": checkpoint_wrapper,
    "blocks checkpointed": lambda model: with_blocks(model, checkpoint_wrapper),
    "compiled": compiled,
    "blocks compiled": lambda model: with_blocks(model, compiled),
}


@pytest.mark.parametrize(
    ("method", "wrap"),
    [
        *((method, wrap) for method in METHODS for wrap in WRAPS if "compiled" not in wrap),
        ("CrAM+", "compiled"),
        ("ACDC", "blocks compiled"),
    ],
)
def test_a_wrapper_put_around_the_model_later_changes_nothing(method: str, wrap: str) -> None:
    model, twin = make_model(1, num_layers=1), make_model(1, num_layers=1)
    optimizer = METHODS[method](model, adamw(model))
    called = WRAPS[wrap](model)
    expected = train(METHODS[method](twin, adamw(twin)), twin, twin)
    found = train(optimizer, called, model)
    if "compiled" in wrap:  # it adds up in another order
        torch.testing.assert_close(found, expected)
    else:
        assert found == expected
        assert list(weights(called).values()) == list(weights(twin).values())


def test_sam_over_none_of_the_models_parameters_is_refused() -> None:
    other = make_model(2)
    with pytest.raises(ValueError) as caught:
        SAM(make_model(1), torch.optim.SGD(other.parameters(), lr=0.1))
    assert "\n" not in str(caught.value)
    model = make_model(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SAM(model, torch.optim.SGD([model.head.weight], lr=0.1))


BASES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "plain sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
}


@pytest.mark.parametrize("method", MASKED)
@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("steps", [1, 2])
def test_masks_of_parameters_that_were_swapped_are_not_lost_silently(
    method: str, base: str, steps: int
) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, BASES[base](model))
    train(optimizer, model, model, range(steps))
    _assign(model)
    hand_over(optimizer, model)
    before = weights(model)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step(closure_of(model, model, steps))
    assert "\n" not in str(caught.value)
    assert weights(model) == before
