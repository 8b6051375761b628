"""Exact weights, validation and resumes leave no trace in training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import qsdp
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.running import Run
from tests_distributed.support.training import (
    State,
    adamw,
    assert_identical,
    exact_state,
    take_step,
)

CONFIG = {"bucket_size": 64}


@contextmanager
def _weights_seen(model: nn.Module) -> Iterator[State]:
    """Collects the weight that each linear and embedding layer computes with, by name."""
    seen: State = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen[name] = module.get_parameter("weight").detach().clone()

        return hook

    handles = [
        module.register_forward_pre_hook(see(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _exact(reshard: bool) -> tuple[State, list[State]]:
    model = shard(make_model(4), reshard=reshard)
    handle = qsdp.install(model, qsdp.QSDPConfig(**CONFIG))
    views = []
    with torch.no_grad():
        for context in (nullcontext(), handle.exact(), nullcontext()):
            with context, _weights_seen(model) as seen:
                model(*make_batch(model, 1))
            views.append(seen)
        with suppress(LookupError), handle.exact():
            model(*make_batch(model, 1))
            raise LookupError
        with _weights_seen(model) as seen:
            model(*make_batch(model, 1))
        views.append(seen)
    return exact_state(model), views


@pytest.mark.parametrize("reshard", [True, False])
def test_exact_shows_the_exact_weights_and_leaves_no_trace(run: Run, reshard: bool) -> None:
    for state, (before, inside, after, after_error) in run(3, _exact, reshard):
        assert_identical(inside, {name: state[f"{name}.weight"] for name in inside})
        assert all(not torch.equal(before[name], inside[name]) for name in inside)
        assert_identical(after, before)
        assert_identical(after_error, before)


def _losses_in_a_region(keeps: bool) -> list[float]:
    model = shard(make_model(4))
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=64, weight_bits=3))
    losses = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
        for context in (nullcontext(), handle.exact(), nullcontext()):
            with context:
                losses.append(float(model(*make_batch(model, 1))))
    return losses


def test_a_region_of_autocast_that_keeps_its_casts_shows_exact_weights_too(run: Run) -> None:
    seen = [run(2, _losses_in_a_region, keeps) for keeps in (True, False)]
    assert seen[0] == seen[1]
    assert all(losses[0] == losses[2] != losses[1] for losses in seen[0])


def _train_validated(validation: str, reshard: bool) -> tuple[list[float], State]:
    model = shard(make_model(5), reshard=reshard)
    handle = qsdp.install(model, qsdp.QSDPConfig(**CONFIG))
    optimizer = adamw(model)
    mode = torch.inference_mode if validation == "inference" else torch.no_grad
    losses = []
    for step in range(2):
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            loss = model(*make_batch(model, 2 * step + micro))
            torch.autograd.backward(loss)
            losses.append(float(loss.detach()))
            if validation == "between micro-batches":
                with handle.exact(), torch.no_grad():
                    model(*make_batch(model, 100 + step))
        optimizer.step()
        optimizer.zero_grad()
        if validation in ("quantized", "inference"):
            for seed in (100, 101):
                with mode():
                    model(*make_batch(model, seed))
        if validation == "exact":
            with handle.exact(), torch.no_grad():
                model(*make_batch(model, 100 + step))
    return losses, exact_state(model)


@pytest.mark.parametrize("reshard", [True, False])
def test_validation_does_not_change_training(run: Run, reshard: bool) -> None:
    expected = run(2, _train_validated, "none", reshard)
    for validation in ("quantized", "inference", "exact", "between micro-batches"):
        found = run(2, _train_validated, validation, reshard)
        for (losses, state), (expected_losses, expected_state) in zip(found, expected, strict=True):
            assert losses == expected_losses, validation
            assert_identical(state, expected_state)


def _resumed(folder: str) -> tuple[Any, Any, dict[str, int]]:
    model = shard(make_model(6), reshard=False)
    handle = qsdp.install(model, qsdp.QSDPConfig(**CONFIG, seed=7, rounding="dither"))
    optimizer = adamw(model)
    for seed in range(2):
        take_step(model, optimizer, seed)
    exact = exact_state(model)
    with torch.no_grad():
        model(*make_batch(model, 50))  # leaves decoded weights: they must not be saved
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    saved = handle.state_dict()
    losses = [take_step(model, optimizer, seed) for seed in range(2, 4)]
    expected = losses, exact_state(model)

    model = shard(make_model(60))
    optimizer = adamw(model)
    # Other keys and an advanced clock: loading must replace both.
    handle = qsdp.install(model, qsdp.QSDPConfig(**CONFIG, seed=8, rounding="dither"))
    torch.autograd.backward(model(*make_batch(model, 9)))
    model.zero_grad()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    loaded = exact_state(model)
    assert_identical(loaded, exact)
    handle.load_state_dict(saved)
    losses = [take_step(model, optimizer, seed) for seed in range(2, 4)]
    return expected, (losses, exact_state(model)), saved


def test_a_resumed_run_draws_the_same_random_numbers(run: Run, tmp_path: Any) -> None:
    for expected, found, saved in run(3, _resumed, str(tmp_path / "checkpoint")):
        assert json.loads(json.dumps(saved)) == saved
        assert found[0] == expected[0]
        assert_identical(found[1], expected[1])
