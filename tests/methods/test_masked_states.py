"""States of AC/DC and gradual pruning: what they go with, and what goes on from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.gmp.optimizer import GMP
from qsdp.methods.gmp.schedule import GMPSchedule
from qsdp.methods.masked import MaskedOptimizer
from tests.support.masked_runs import BASES, GRADUAL, SCHEDULE, backward, weights
from tests.support.masked_runs import trained as _trained
from tests_distributed.support.helpers import make_model


@pytest.mark.parametrize("through_dcp", [False, True])
@pytest.mark.parametrize("method", ["acdc", "gmp"])
def test_a_state_goes_with_its_own_schedule(method: str, through_dcp: bool) -> None:
    def make(changed: bool) -> tuple[Any, Any]:
        model = make_model(seed=3)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if method == "acdc":
            return model, ACDC(model, base, schedule=22 if changed else 20)
        gradual = GMPSchedule.of(22 if changed else 20, 0.9)
        return model, GMP(model, base, schedule=gradual)

    model, optimizer = make(changed=False)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    for changed in (False, True):
        other_model, other = make(changed)
        if through_dcp:
            saved: Any = get_optimizer_state_dict(model, optimizer)

            def load(own: Any = (other_model, other), saved: Any = saved) -> None:
                set_optimizer_state_dict(*own, optim_state_dict=saved)
        else:

            def load(own: Any = other) -> None:
                own.load_state_dict(optimizer.state_dict())

        if changed:
            with pytest.raises(ValueError, match="whose phases have other masks"):
                load()
        else:
            load()
            assert other.num_steps == 4


@pytest.mark.parametrize("patterns", [["blocks.0.*.weight"], ["blocks.*"], "nothing at all"])
@pytest.mark.parametrize("method", ["acdc", "gmp"])
def test_a_state_goes_with_its_own_prunable_set(method: str, patterns: Any) -> None:
    """Else a compressed phase would prune nothing of what has no mask."""

    def make(prunable: Any) -> tuple[Any, MaskedOptimizer]:
        model = make_model(seed=3)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if method == "acdc":
            return model, ACDC(model, base, schedule=SCHEDULE, prunable=prunable)
        return model, GMP(model, base, schedule=GRADUAL, prunable=prunable)

    model, optimizer = make(None)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    if patterns == "nothing at all":
        _, other = make(None)
        for each in state["state"].values():
            each.pop("mask", None)
    else:
        _, other = make(patterns)
    mistake = {
        "nothing at all": "the state's 0 masks are of other parameters than the 8",
        "blocks.0.*.weight": r"no mask of blocks\.0\.norm1.* a mask of blocks\.1\.qkv.* that this",
        "blocks.*": r"the state has no mask of blocks\.0\.\S+ \(and \d+ more\):",
    }
    match = mistake[patterns if isinstance(patterns, str) else patterns[0]]
    with pytest.raises(ValueError, match=match) as caught:
        other.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert other.num_steps == 0


@pytest.mark.parametrize("through_dcp", [False, True])
@pytest.mark.parametrize("method", ["acdc", "gmp"])
def test_a_mask_goes_to_the_parameter_of_its_name_or_is_refused(
    method: str, through_dcp: bool
) -> None:
    """torch's own state goes by number, and the blocks' matrices have equal shapes."""

    def make(is_turned: bool) -> tuple[Any, MaskedOptimizer]:
        model = make_model(seed=3)
        first, second = reversed(model.blocks) if is_turned else model.blocks
        parts = [model.embed, model.position, first, second, model.norm, model.head]
        base = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=1e-2)
        if method == "acdc":
            return model, ACDC(model, base, schedule=SCHEDULE)
        return model, GMP(model, base, schedule=GRADUAL)

    model, optimizer = make(is_turned=False)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    masks = {name: mask.clone() for name, mask in optimizer.masks().items()}
    other_model, other = make(is_turned=True)
    if through_dcp:
        saved: Any = get_optimizer_state_dict(model, optimizer)
        set_optimizer_state_dict(other_model, other, optim_state_dict=saved)
        for name, mask in other.masks().items():
            assert torch.equal(mask, masks[name])
        assert not all(mask.all() for mask in masks.values())
    else:
        with pytest.raises(ValueError, match=r"places, blocks\.0\.\S+ where .* blocks\.1\."):
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert other.num_steps == 0


@pytest.mark.parametrize(
    ("order", "mistake"),
    [
        ("reversed", r"places, blocks\.0\.qkv\.weight where this ACDC has blocks\.1\.mlp"),
        ("decayed first", "in other places, since the base"),
    ],
)
def test_masks_among_parameters_in_another_order_are_refused_for_that(
    order: str, mistake: str
) -> None:
    """Not for another prunable set, which it is not."""

    def make(is_other: bool) -> tuple[Any, MaskedOptimizer]:
        model = make_model(seed=3)
        parameters: Any = list(model.parameters())
        if is_other and order == "reversed":
            parameters.reverse()
        elif is_other:
            groups = [
                [p for p in parameters if (p.dim() > 1) is decays] for decays in (True, False)
            ]
            parameters = [{"params": group} for group in groups]
        return model, ACDC(model, torch.optim.SGD(parameters, lr=1e-2), schedule=SCHEDULE)

    model, optimizer = make(is_other=False)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    _, other = make(is_other=True)
    state["param_groups"] = [
        {**state["param_groups"][0], "params": group["params"]}
        for group in other.state_dict()["param_groups"]
    ]
    with pytest.raises(ValueError, match=mistake + r".*stand in another order: make it as it was"):
        other.load_state_dict(state)
    assert other.num_steps == 0


@pytest.mark.parametrize("through_dcp", [False, True])
@pytest.mark.parametrize(
    ("base", "method"),
    [("sgd", "acdc"), ("plain sgd", "acdc"), ("adamw", "acdc"), ("adamw", "gmp")],
)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    base: str, method: str, through_dcp: bool
) -> None:
    """Interrupted within a compressed phase; the learning rate begins at 0."""

    def make(seed: int) -> tuple[Any, Any, Any]:
        model = make_model(seed=seed, frozen=True, tied=True, unused=True)
        made = BASES[base](model.parameters() if through_dcp else _trained(model))
        if method == "acdc":
            optimizer: Any = ACDC(model, made, schedule=SCHEDULE, target=0.8)
        else:
            optimizer = GMP(model, made, schedule=GRADUAL)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / 4))
        return model, optimizer, schedule

    def train(run: tuple[Any, Any, Any], steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(backward(run[0], step))
            run[1].step()
            run[2].step()
        return losses

    run, again = make(4), make(5)
    assert run[1].param_groups[0]["lr"] == 0.0
    train(run, range(5))
    saved = copy.deepcopy(
        (
            run[0].state_dict(),
            get_optimizer_state_dict(run[0], run[1]) if through_dcp else run[1].state_dict(),
            run[2].state_dict(),
        )
    )
    masks = copy.deepcopy(run[1].masks())
    losses = train(run, range(5, 22))
    again[0].load_state_dict(saved[0])
    if through_dcp:
        set_optimizer_state_dict(again[0], again[1], saved[1])
    else:
        again[1].load_state_dict(saved[1])
    again[2].load_state_dict(saved[2])
    assert again[1].num_steps == 5
    torch.testing.assert_close(again[1].masks(), masks, rtol=0, atol=0)
    assert not all(m.all() for m in masks.values())
    assert again[1].base.state is again[1].state
    assert train(again, range(5, 22)) == losses
    torch.testing.assert_close(weights(again[0]), weights(run[0]), rtol=0, atol=0)
    torch.testing.assert_close(again[1].masks(), run[1].masks(), rtol=0, atol=0)


def test_a_state_dict_of_a_fresh_optimizer_changes_nothing() -> None:
    for base in BASES.values():
        model = make_model()
        optimizer = ACDC(model, base(model.parameters()), schedule=SCHEDULE)
        before = weights(model)
        state = get_optimizer_state_dict(model, optimizer)
        torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
        assert optimizer.num_steps == optimizer.skipped_steps == 0
        assert state["state"]["blocks.0.qkv.weight"]["mask"].dtype == torch.bool


def test_a_bare_base_optimizers_state_can_be_loaded() -> None:
    model = make_model()
    base = torch.optim.AdamW(model.parameters())
    backward(model, 0)
    base.step()
    optimizer = ACDC(model, torch.optim.AdamW(model.parameters()), schedule=SCHEDULE)
    optimizer.load_state_dict(base.state_dict())
    assert optimizer.num_steps == 0
    assert all(mask.all() for mask in optimizer.masks().values())
    for step in range(4):
        backward(model, step)
        optimizer.step()
    assert not any(mask.all() for mask in optimizer.masks().values())


@pytest.mark.parametrize("is_kept", [False, True], ids=["gone", "kept"])
def test_who_wraps_a_base_last_says_what_its_states_are_of(is_kept: bool) -> None:
    def wrapped() -> ACDC:
        return ACDC(model, base, schedule=SCHEDULE, target=0.5)

    model = make_model()
    base = torch.optim.AdamW(model.parameters())
    earlier = GMP(model, base, schedule=GRADUAL) if is_kept else None
    ACDC(model, base, schedule=SCHEDULE, target=0.9)
    optimizer = wrapped()
    for step in range(4):
        backward(model, step)
        optimizer.step()
    saved, masks = copy.deepcopy(optimizer.state_dict()), optimizer.masks()
    optimizer.load_state_dict(saved)
    base = torch.optim.AdamW(model.parameters())
    again = wrapped()
    again.load_state_dict(saved)
    torch.testing.assert_close(again.masks(), masks, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.masks(), masks, rtol=0, atol=0)
    assert earlier is None or not earlier._loaded_masks
    with pytest.raises(ValueError, match="the state was made under"):
        ACDC(model, base, schedule=SCHEDULE, target=0.9).load_state_dict(saved)
