"""What a step is given: a closure or none, and gradients of earlier micro-batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.support.optimizers import (
    MASKED,
    METHODS,
    NUM_STEPS,
    TWO_PASSES,
    adamw,
    bits,
    closure_of,
    train,
    weights,
)
from tests_distributed.support.helpers import make_model


@pytest.mark.parametrize("method", TWO_PASSES)
@pytest.mark.parametrize(
    ("lr", "has_grads", "steps"), [(0.1, True, 0), (0.1, False, 0), (0.0, True, 0), (0.1, True, 1)]
)
def test_two_passes_need_a_closure(method: str, lr: float, has_grads: bool, steps: int) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))
    train(optimizer, model, model, range(steps))
    if has_grads:
        closure_of(model, model, steps)()

    def found() -> Any:
        return (
            weights(model),
            [bits(p.grad) for p in model.parameters()],
            [bits(state["momentum_buffer"]) for state in optimizer.state.values()],
            optimizer.num_steps,
        )

    before = found()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    assert found() == before


@pytest.mark.parametrize("method", TWO_PASSES)
def test_a_trainers_own_step_after_that_with_a_closure_does_nothing(method: str) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, adamw(model))
    train(optimizer, model, model, range(1))
    before = weights(model)
    assert optimizer.step() is None
    assert weights(model) == before
    assert optimizer.num_steps == 1


@pytest.mark.parametrize("method", TWO_PASSES)
def test_the_bases_step_is_the_plain_one(method: str) -> None:
    model, plain = make_model(1), make_model(1)
    optimizer, alone = METHODS[method](model, adamw(model)), adamw(plain)
    closure_of(model, model, 0)()
    closure_of(plain, plain, 0)()
    optimizer.base.step()
    alone.step()
    assert weights(model) == weights(plain)
    assert optimizer.num_steps == 0


@pytest.mark.parametrize("method", MASKED)
def test_a_closure_is_one_way_of_two_to_take_a_masked_step(method: str) -> None:
    models = [make_model(1), make_model(1)]
    first, second = (METHODS[method](model, adamw(model)) for model in models)
    train(first, models[0], models[0])
    for step in range(NUM_STEPS):
        second.zero_grad()
        closure_of(models[1], models[1], step)()
        assert second.step() is None
    assert weights(models[0]) == weights(models[1])


@pytest.mark.parametrize("method", TWO_PASSES)
@pytest.mark.parametrize("where", ["all", "head.weight"])
def test_gradients_of_earlier_micro_batches_are_refused(method: str, where: str) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, adamw(model))
    closure_of(model, model, 0)()
    if where != "all":
        for name, parameter in model.named_parameters():
            parameter.grad = parameter.grad if name == where else None
    before = weights(model), [bits(p.grad) for p in model.parameters()]
    num_calls = 0

    def closure() -> None:
        nonlocal num_calls
        num_calls += 1

    with pytest.raises(RuntimeError, match="micro-batch"):
        optimizer.step(closure)
    assert (weights(model), [bits(p.grad) for p in model.parameters()]) == before
    assert num_calls == optimizer.num_steps == 0
    optimizer.zero_grad()
    twin = make_model(1)
    expected = train(METHODS[method](twin, adamw(twin)), twin, twin)
    assert train(optimizer, model, model) == expected
    assert weights(model) == weights(twin)


@pytest.mark.parametrize("method", TWO_PASSES)
def test_gradients_of_a_step_that_is_tried_again_are_refused_too(method: str) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, adamw(model))
    train(optimizer, model, model, range(1))
    closure_of(model, model, 1)()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="micro-batch"):
            optimizer.step(closure_of(model, model, 1))


@pytest.mark.parametrize("method", TWO_PASSES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_gradients_that_were_filled_with_zeros_are_none(method: str, zero: float) -> None:
    model, twin = make_model(1), make_model(1)
    optimizer, other = METHODS[method](model, adamw(model)), METHODS[method](twin, adamw(twin))
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, zero)
        optimizer.zero_grad(set_to_none=math.copysign(1, zero) < 0 and step > 0)
        found = optimizer.step(closure_of(model, model, step))
        assert found == other.step(closure_of(twin, twin, step))
    assert weights(model) == weights(twin)


@pytest.mark.parametrize("method", MASKED)
def test_a_closures_gradient_is_added_to_those_that_are_there(method: str) -> None:
    models = [make_model(1), make_model(1)]
    for model, is_split in zip(models, (True, False), strict=True):
        optimizer = METHODS[method](model, adamw(model))
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            closure_of(model, model, 2 * step)()
            last = closure_of(model, model, 2 * step + 1)
            if is_split:
                optimizer.step(last)
            else:
                last()
                optimizer.step()
    assert weights(models[0]) == weights(models[1])
