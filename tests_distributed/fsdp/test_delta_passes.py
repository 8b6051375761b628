"""Passes cut short, begun ahead, or of other parameters, on all ranks, where changes are sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests_distributed.support.delta import (
    decoded,
    installed,
    same_on_all_ranks,
    take_sgd_step,
)
from tests_distributed.support.helpers import full_state, make_batch
from tests_distributed.support.running import Run

CONFIG = {"weight_bits": 4, "grad_bits": 8, "delta_redraw_every": 3}


def _gradually_thawed() -> tuple[list[bool], float]:
    """Parameters change between frozen and trained, on all ranks alike."""
    model, handle = installed(7, CONFIG, reshard=None)
    same = []
    for step, patterns in enumerate(["mlp", "qkv", "norm", "", "mlp", "out", ""]):
        for module in (*[block.mlp for block in model.blocks], *model.blocks, model):
            module.reshard()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(patterns in name)
        take_sgd_step(model, step, 0.1)
        same.append(same_on_all_ranks(decoded(model)))
    exact, weights = full_state(model), decoded(model)
    errors = [
        float((weights[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in exact
    ]
    handle.remove()
    return same, max(errors)


def test_what_is_trained_may_change_on_all_ranks(run: Run) -> None:
    for same, error in run(3, _gradually_thawed):
        assert all(same)
        assert error < 0.3


def _cut_short(fails: bool) -> tuple[list[float], dict[str, Any]]:
    """A training in which a model raises in the middle of forward passes, and takes them again."""
    model, _ = installed(8, CONFIG)
    losses = []
    for step in range(4):
        for at in range(fails * len(model.blocks)):

            def fail(*_: object) -> None:
                raise LookupError

            hook = model.blocks[at].qkv.register_forward_hook(fail)
            with pytest.raises(LookupError):
                model(*make_batch(model, 50 + at))
            hook.remove()
        losses.append(take_sgd_step(model, step, 0.1))
    return losses, {name: value.tolist() for name, value in full_state(model).items()}


def _equal_to_one_without() -> bool:
    return _cut_short(True) == _cut_short(False)


def test_a_step_after_forward_passes_that_raised_is_that_of_a_run_without(run: Run) -> None:
    assert run(3, _equal_to_one_without) == [True] * 3


def _ahead(gathers: bool) -> tuple[list[float], dict[str, Any]]:
    """A training between whose steps groups are gathered that nobody waits for."""
    model, handle = installed(9, CONFIG)
    losses = []
    for step in range(4):
        if gathers:
            model.blocks[1].unshard(async_op=True)
            model.blocks[0].mlp.unshard(async_op=True)
            if step % 2:
                with handle.exact(), torch.no_grad():
                    model(*make_batch(model, 60))
        losses.append(take_sgd_step(model, step, 0.1))
    model.blocks[1].unshard(async_op=True)
    handle.state_dict()
    handle.remove()
    return losses, {name: value.tolist() for name, value in full_state(model).items()}


def _equal_to_one_without_gathers_ahead() -> bool:
    return _ahead(True) == _ahead(False)


def test_frames_that_nobody_waits_for_are_applied_all_the_same(run: Run) -> None:
    assert run(2, _equal_to_one_without_gathers_ahead) == [True, True]
