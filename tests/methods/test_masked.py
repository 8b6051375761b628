"""AC/DC and gradual pruning in one process, against a reference on a plain model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.gmp.optimizer import GMP
from qsdp.methods.masked import MaskedOptimizer
from tests.support.masked_reference import cubic
from tests.support.masked_runs import (
    BASES,
    GRADUAL,
    SCHEDULE,
    SIZES,
    STEPS,
    acdc_reference,
    backward,
    gmp_reference,
    is_compressed,
    trained,
    weights,
)
from tests_distributed.support.helpers import make_model


def _zeros(optimizer: MaskedOptimizer) -> int:
    """Exact +0.0 among the prunable weights."""
    return sum(int((p.view(torch.int32) == 0).sum()) for p in optimizer.prunable.parameters)


@pytest.mark.parametrize(
    ("base", "target", "keeps"),
    [
        ("sgd", 0.9, {"sparsity": 0.9}),
        ("adamw", "0.5+layer", {"sparsity": 0.5, "layer": True}),
        ("plain sgd", "2:4", {"pattern": (2, 4)}),
        ("adamw", "2:4", {"pattern": (2, 4)}),
        ("adamw", "0.75+block4", {"sparsity": 0.75, "block": 4}),
    ],
    ids=str,
)
def test_acdc_is_the_paper_step_by_step(base: str, target: Any, keeps: dict[str, Any]) -> None:
    options: dict[str, Any] = {**SIZES, "tied": base == "sgd", "conv1d": base == "adamw"}
    model, plain = make_model(seed=1, **options), make_model(seed=1, **options)
    limit = 1.0 if "sgd" in base else None
    optimizer = ACDC(
        model, BASES[base](model.parameters()), schedule=SCHEDULE, target=target, max_norm=limit
    )
    reference = acdc_reference(plain, BASES[base], keeps, max_norm=limit or math.inf)
    total = sum(p.numel() for p in optimizer.prunable.parameters)
    pruned = round(total * (0.5 if target == "2:4" else keeps["sparsity"]))
    called = []
    optimizer.before_pruning = lambda: called.append(_zeros(optimizer))
    for step in range(STEPS):
        assert backward(model, step) == pytest.approx(backward(plain, step), abs=1e-5)
        before = {name: mask.clone() for name, mask in optimizer.masks().items()}
        optimizer.step()
        reference.step()
        torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
        masks = optimizer.masks()
        torch.testing.assert_close(masks, reference.masks, rtol=0, atol=0)
        if is_compressed(step) or is_compressed(step + 1):
            assert _zeros(optimizer) == pruned
        if is_compressed(step) and is_compressed(step + 1):
            torch.testing.assert_close(masks, before, rtol=0, atol=0)
        if is_compressed(step) and not is_compressed(step + 1):
            assert all(mask.all() for mask in masks.values())
            for state in optimizer.state.values():
                assert not any(state[m].any() for m in ("exp_avg", "momentum_buffer") if m in state)
        if base == "adamw":
            for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                for moment in ("exp_avg", "exp_avg_sq", "step"):
                    torch.testing.assert_close(
                        optimizer.state[mine][moment], reference.base.state[theirs][moment]
                    )
    entries = sum(is_compressed(s + 1) and not is_compressed(s) for s in range(STEPS))
    assert called == [0] * entries
    assert optimizer.num_steps == STEPS
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(("base", "scope"), [("sgd", "global"), ("adamw", "layer")])
def test_gradual_pruning_is_the_cubic_schedule_step_by_step(base: str, scope: str) -> None:
    model, plain = make_model(seed=1), make_model(seed=1)
    optimizer = GMP(model, BASES[base](model.parameters()), schedule=GRADUAL, scope=scope)
    reference = gmp_reference(plain, BASES[base], {"layer": scope == "layer"})
    total = sum(p.numel() for p in optimizer.prunable.parameters)
    for step in range(STEPS):
        backward(model, step)
        backward(plain, step)
        before = optimizer.masks()
        before = {name: mask.clone() for name, mask in before.items()}
        optimizer.step()
        reference.step()
        torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
        masks = optimizer.masks()
        torch.testing.assert_close(masks, reference.masks, rtol=0, atol=0)
        assert all((mask <= before[name]).all() for name, mask in masks.items())
        if step + 1 >= 2 and scope == "global":
            place = min((step + 1 - 2) // 5, 3)
            assert _zeros(optimizer) == round(cubic(place / 3, 0.9, 0.3) * total)


def test_gradual_pruning_keeps_its_support_where_weights_do_not_move() -> None:
    """The output layers begin at zero and a learning rate of 0 leaves them there."""
    model = make_model(seed=1)
    with torch.no_grad():
        model.blocks[0].out.weight.zero_()
        model.blocks[0].qkv.weight[:20].zero_()
    optimizer = GMP(model, torch.optim.SGD(model.parameters(), lr=0.0), schedule=GRADUAL)
    for step in range(STEPS):
        before = {name: mask.clone() for name, mask in optimizer.masks().items()}
        backward(model, step)
        optimizer.step()
        assert all((mask <= before[name]).all() for name, mask in optimizer.masks().items())


def test_bad_arguments_are_refused_in_a_sentence() -> None:
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    for options, message in (
        ({"schedule": SCHEDULE, "target": "0.5+4bit"}, "a mask rounds no weights"),
        ({"schedule": SCHEDULE, "target": "2:4"}, "cannot cut into groups of 4"),
        ({"schedule": SCHEDULE, "max_norm": 0.0}, "max_norm is 0.0"),
        ({"schedule": ACDCSchedule.of(20, warmup=0)}, "but AC/DC begins dense"),
        ({"schedule": 20, "prunable": ["nothing"]}, "matches no parameter"),
        ({"schedule": 10.0}, "the schedule is 10.0"),
        ({"schedule": None}, "the schedule is None"),
        ({"schedule": SCHEDULE, "prunable": "*.weight"}, "give a list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            ACDC(model, base, **options)
    with pytest.raises(ValueError, match="the schedule is 10"):
        GMP(model, base, schedule=10)  # type: ignore[arg-type]
    double = make_model().double()
    for target in (0.5, "2:4+4bit", "4bit"):
        with pytest.raises(ValueError, match=r"is torch\.float64, but only"):
            CrAM(double, torch.optim.SGD(double.parameters()), sparsity=target)
    with pytest.raises(ValueError, match=r"is torch\.float64, but only"):
        ACDC(double, torch.optim.SGD(double.parameters()), schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"is torch\.float64, but only"):
        GMP(double, torch.optim.SGD(double.parameters()), schedule=GRADUAL)
    with pytest.raises(ValueError, match="scope is 'row'"):
        GMP(model, base, schedule=GRADUAL, scope="row")
    with pytest.raises(ValueError, match="lacks 8 prunable"):
        GMP(make_model(), base, schedule=GRADUAL)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bad_step", [0, 2, 4, 6])
def test_a_gradient_that_is_not_finite_skips_the_step_but_counts_it(
    bad: float, bad_step: int
) -> None:
    """Steps 2 and 6 end a phase: the masks change all the same."""
    model = make_model(seed=2)
    optimizer = ACDC(model, torch.optim.AdamW(model.parameters()), schedule=SCHEDULE, target=0.8)
    total = sum(p.numel() for p in optimizer.prunable.parameters)
    for step in range(bad_step):
        backward(model, step)
        optimizer.step()
    before = weights(model)
    moments = copy.deepcopy([state.get("exp_avg_sq") for state in optimizer.state.values()])
    backward(model, bad_step)
    model.norm.bias.grad[3] = bad
    optimizer.step()
    assert (optimizer.num_steps, optimizer.skipped_steps) == (bad_step + 1, 1)
    assert not math.isfinite(optimizer.last_grad_norm or 0)
    assert _zeros(optimizer) == (round(0.8 * total) if bad_step in (2, 4, 6) else 0)
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items() if "blocks" not in n)
    now = [state.get("exp_avg_sq") for state in optimizer.state.values()]
    torch.testing.assert_close(now, moments, rtol=0, atol=0)
    assert all(m.dtype == torch.bool for m in optimizer.masks().values())
    assert all(m.all() == (bad_step in (0, 6)) for m in optimizer.masks().values())
    for step in range(bad_step + 1, 9):
        backward(model, step)
        optimizer.step()
    assert optimizer.skipped_steps == 1


def test_frozen_weights_are_neither_pruned_nor_counted() -> None:
    model = make_model(frozen=True)
    frozen = model.blocks[0].out.weight.detach().clone()
    optimizer = ACDC(model, torch.optim.SGD(trained(model), lr=0.1), schedule=SCHEDULE)
    total = sum(p.numel() for p in optimizer.prunable.parameters)
    assert "blocks.0.out.weight" not in optimizer.masks()
    for step in range(4):
        backward(model, step)
        optimizer.step()
    assert torch.equal(model.blocks[0].out.weight, frozen)
    assert _zeros(optimizer) == round(0.9 * total)


@pytest.mark.parametrize("late", ["all skipped", "unused at first"])
def test_a_first_gradient_may_come_after_the_mask(late: str) -> None:
    model = make_model(unused=True)
    optimizer = ACDC(model, torch.optim.AdamW(model.parameters(), lr=1e-2), schedule=SCHEDULE)
    for step in range(6):
        backward(model, step)
        if late == "all skipped" and step < 4:
            model.norm.bias.grad[0] = math.nan
        if late == "unused at first" and step > 4:
            model.blocks[0].unused.weight.grad = torch.ones_like(model.blocks[0].unused.weight)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
    unused = model.blocks[0].unused.weight
    mask = optimizer.masks()["blocks.0.unused.weight"]
    assert not unused[~mask].any()
    assert ("exp_avg" in optimizer.state[unused]) == (late == "unused at first")


def test_a_closure_gives_the_loss() -> None:
    model = make_model()
    optimizer = ACDC(model, torch.optim.SGD(model.parameters(), lr=0.1), schedule=SCHEDULE)
    assert optimizer.step(lambda: backward(model, 0)) > 0
    assert optimizer.num_steps == 1
