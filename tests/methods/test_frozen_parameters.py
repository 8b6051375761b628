"""Parameters that are frozen under masks keep them.

Those that are unfrozen get one when masks are renewed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsdp.methods.masked import MaskedOptimizer
from tests.support.optimizers import (
    MASKED,
    RARELY_RENEWED,
    WEIGHT,
    adamw,
    assert_masked,
    bits,
    said,
    share_due,
    train,
    weights,
)
from tests_distributed.support.helpers import Toy, make_model


def _assert_masked(optimizer: MaskedOptimizer, trained: Mapping[str, Tensor]) -> None:
    assert_masked(share_due(optimizer), optimizer.masks(), trained)


def _prunable(model: Toy) -> dict[str, nn.Parameter]:
    suffixes = ("qkv.weight", "out.weight", "up.weight", "down.weight")
    return {n: p for n, p in model.named_parameters() if n.endswith(suffixes)}


@pytest.mark.parametrize("method", MASKED)
def test_an_unfrozen_weight_is_masked_from_the_next_renewal_on(method: str) -> None:
    model = make_model(1)
    weight = model.get_parameter(WEIGHT).requires_grad_(False)
    optimizer = RARELY_RENEWED[method](model, adamw(model))
    train(optimizer, model, model, range(2))
    others = {name: p for name, p in _prunable(model).items() if name != WEIGHT}
    _assert_masked(optimizer, others)
    before = weight.clone()
    weight.requires_grad_(True)
    train(optimizer, model, model, range(2, 4))
    assert not (weight == 0).any()
    assert not torch.equal(weight, before)
    for step in (4, 5):
        train(optimizer, model, model, range(step, step + 1))
        _assert_masked(optimizer, _prunable(model))
    assert (weight == 0).any()


@pytest.mark.parametrize("method", MASKED)
def test_a_frozen_weight_is_counted_no_longer_and_stays_as_it_is(method: str) -> None:
    model = make_model(1)
    weight = model.get_parameter(WEIGHT)
    optimizer = RARELY_RENEWED[method](model, adamw(model))
    train(optimizer, model, model, range(2))
    _assert_masked(optimizer, _prunable(model))
    weight.requires_grad_(False)
    before = bits(weight)
    others = {name: p for name, p in _prunable(model).items() if name != WEIGHT}
    train(optimizer, model, model, range(2, 5))
    _assert_masked(optimizer, others)
    train(optimizer, model, model, range(5, 9))
    assert bits(weight) == before
    assert (weight == 0).any()


@pytest.mark.parametrize("method", MASKED)
def test_a_weight_that_is_frozen_for_a_while_is_masked_again(method: str) -> None:
    model = make_model(1)
    weight = model.get_parameter(WEIGHT)
    optimizer = RARELY_RENEWED[method](model, adamw(model))
    train(optimizer, model, model, range(2))
    weight.requires_grad_(False)
    train(optimizer, model, model, range(2, 4))
    weight.requires_grad_(True)
    train(optimizer, model, model, range(4, 6))
    _assert_masked(optimizer, _prunable(model))


# --- what is read in between -------------------------------------------------------------------


READS: dict[str, Callable[[Any], object]] = {
    "nothing": lambda optimizer: None,
    "masks": lambda optimizer: optimizer.masks(),
    "state": lambda optimizer: optimizer.state_dict(),
    "prunable": lambda optimizer: optimizer.prunable.names,
}


@pytest.mark.parametrize("method", MASKED)
@pytest.mark.parametrize("read", READS)
def test_what_is_frozen_for_a_moment_keeps_its_mask(method: str, read: str) -> None:
    model, plain = make_model(1), make_model(1)
    optimizer, twin = (RARELY_RENEWED[method](each, adamw(each)) for each in (model, plain))
    train(optimizer, model, model, range(2))
    train(twin, plain, plain, range(2))
    model.requires_grad_(False)
    READS[read](optimizer)
    model.requires_grad_(True)
    train(optimizer, model, model, range(2, 4))
    train(twin, plain, plain, range(2, 4))
    assert weights(model) == weights(plain)


def test_a_state_saved_while_a_part_is_frozen_has_all_masks() -> None:
    model, other = make_model(1), make_model(1)
    optimizer, resumed = (RARELY_RENEWED["GMP"](each, adamw(each)) for each in (model, other))
    train(optimizer, model, model, range(2))
    for each in (model, other):
        each.get_parameter(WEIGHT).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (model, other):
        each.get_parameter(WEIGHT).requires_grad_(True)
    train(optimizer, model, model, range(2, 4))
    train(resumed, other, other, range(2, 4))
    assert weights(model) == weights(other)
    assert (other.get_parameter(WEIGHT) == 0).any()


@pytest.mark.parametrize("method", MASKED)
def test_what_is_frozen_with_its_gradient_stays_pruned(method: str) -> None:
    """AdamW moves what has a gradient, though it be zero."""
    model = make_model(1)
    optimizer = RARELY_RENEWED[method](model, adamw(model))
    train(optimizer, model, model, range(2))
    zeros = model.get_parameter(WEIGHT) == 0
    assert zeros.any()
    model.get_parameter(WEIGHT).requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(model.get_parameter(WEIGHT) == 0, zeros)


def test_masks_are_lifted_from_what_is_frozen_too() -> None:
    model = make_model(1)
    optimizer = RARELY_RENEWED["ACDC"](model, adamw(model))
    train(optimizer, model, model, range(2))
    assert not optimizer.masks()[WEIGHT].all()
    model.get_parameter(WEIGHT).requires_grad_(False)
    train(optimizer, model, model, range(2, 4))
    model.get_parameter(WEIGHT).requires_grad_(True)
    assert optimizer.masks()[WEIGHT].all()


def test_what_is_trained_may_change_altogether() -> None:
    model = make_model(1)
    for parameter in model.blocks[1].parameters():
        parameter.requires_grad_(False)
    optimizer = RARELY_RENEWED["GMP"](model, adamw(model))
    train(optimizer, model, model, range(2))
    for block, is_trained in zip(model.blocks, (False, True), strict=True):
        block.requires_grad_(is_trained)
    with pytest.warns(UserWarning, match=r"GMP trains blocks\.1\.qkv\.weight, "):
        train(optimizer, model, model, range(2, 3))


def test_masks_that_are_gone_are_missed() -> None:
    model = make_model(1)
    optimizer = RARELY_RENEWED["GMP"](model, adamw(model))
    train(optimizer, model, model, range(2))
    optimizer.state.clear()
    assert "the masks of GMP are gone from the optimizer's state" in said(optimizer.step)


def test_what_is_trained_anew_under_masks_is_named() -> None:
    model = make_model(1)
    model.get_parameter(WEIGHT).requires_grad_(False)
    optimizer = RARELY_RENEWED["GMP"](model, adamw(model))
    train(optimizer, model, model, range(2))
    model.get_parameter(WEIGHT).requires_grad_(True)
    with pytest.warns(UserWarning, match=f"GMP trains {WEIGHT}, and prunes nothing of it"):
        train(optimizer, model, model, range(2, 3))


@pytest.mark.parametrize("method", MASKED)
def test_a_set_that_is_frozen_as_a_whole_is_said_and_not_counted(method: str) -> None:
    model = make_model(1)
    for parameter in _prunable(model).values():
        parameter.requires_grad_(False)
    with pytest.warns(UserWarning, match="prunes nothing, because all of its prunable weights are"):
        optimizer = RARELY_RENEWED[method](model, adamw(model))
    before = weights(model)
    train(optimizer, model, model, range(6))
    assert optimizer.pruned == 0.0
    assert all(weights(model)[name] == before[name] for name in _prunable(model))
    assert optimizer.masks() == {}
