"""What a step over shards is given: a closure or none, and gradients of earlier micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.support.optimizers import (
    MASKED,
    METHODS,
    NUM_STEPS,
    TWO_PASSES,
    adamw,
    bits,
    closure_of,
    said,
    train,
)
from tests_distributed.support.helpers import collected, shard
from tests_distributed.support.running import Run, selection
from tests_distributed.support.small_toy import small_toy, whole_bits


def _refuse_without_closure() -> dict[str, tuple[str, bool]]:
    found = {}
    for method in TWO_PASSES:
        model = shard(small_toy())
        optimizer = METHODS[method](model, adamw(model))
        closure_of(model, model, 0, None)()

        def seen(model: Any = model) -> Any:
            return [(bits(p.to_local()), bits(p.grad.to_local())) for p in model.parameters()]

        before = seen()
        text = said(optimizer.step)
        found[method] = text, seen() == before and not optimizer.state
    return found


def test_two_passes_need_a_closure_on_every_rank(run: Run) -> None:
    for found in run(2, _refuse_without_closure):
        for text, is_unchanged in found.values():
            assert "closure" in text
            assert is_unchanged


FROM_BEFORE = ("every rank", "rank 1", "one rank, one shard", "held back")


def _refuse_micro_batches(which: str, method: str) -> str:
    model: Any = shard(small_toy())
    twin: Any = shard(small_toy())
    optimizer = METHODS[method](model, adamw(model))
    first = closure_of(model, model, 7, None)
    if which == "held back":
        model.set_requires_gradient_sync(False)
        first()
        model.set_requires_gradient_sync(True)
    else:
        first()
        if which == "rank 1" and dist.get_rank() != 1:
            model.zero_grad()
        if which == "one rank, one shard":
            for name, parameter in model.named_parameters():
                if dist.get_rank() != 1 or name != "blocks.0.qkv.weight":
                    parameter.grad = None

    def seen() -> Any:
        return [
            (bits(p.to_local()), None if p.grad is None else bits(p.grad.to_local()))
            for p in model.parameters()
        ]

    before = seen()
    text = said(lambda: optimizer.step(closure_of(model, model, 0, None)))
    assert seen() == before
    assert optimizer.num_steps == 0
    if which == "held back":  # they are still there
        twin.set_requires_gradient_sync(False)
        closure_of(twin, twin, 7, None)()
        twin.set_requires_gradient_sync(True)
        for each in (model, twin):
            closure_of(each, each, 8, None)()
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert bits(parameter.grad.to_local()) == bits(other.grad.to_local())
        twin = shard(small_toy())
    optimizer.zero_grad()
    expected = train(METHODS[method](twin, adamw(twin)), twin, twin, range(2), rank=None)
    assert train(optimizer, model, model, range(2), rank=None) == expected
    assert whole_bits(model) == whole_bits(twin)
    return text


@selection(
    "method, which",
    [*(("CrAM+", which) for which in FROM_BEFORE), ("SAM", "held back")],
    ["CrAM+", "SAM"],
    FROM_BEFORE,
)
def test_gradients_of_earlier_micro_batches_are_refused_by_all(
    run: Run, method: str, which: str
) -> None:
    for text in run(2, _refuse_micro_batches, which, method):
        assert "micro-batch" in text


def _refuse_micro_batches_under_ddp() -> str:
    toy = small_toy()
    model = DistributedDataParallel(toy)
    optimizer = METHODS["CrAM+"](model, adamw(toy))
    with model.no_sync():
        closure_of(model, toy, 0, None)()
    return said(lambda: optimizer.step(closure_of(model, toy, 1, None)))


def test_gradients_of_earlier_micro_batches_are_refused_under_ddp(run: Run) -> None:
    for text in run(2, collected, _refuse_micro_batches_under_ddp):
        assert "micro-batch" in text


def _add_to_gradients(method: str, held_back: bool) -> None:
    """With a closure for the last micro-batch, or with none."""
    models = [shard(small_toy()), shard(small_toy())]
    for model, is_split in zip(models, (True, False), strict=True):
        optimizer = METHODS[method](model, adamw(model))
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            model.set_requires_gradient_sync(not held_back)  # type: ignore[operator]
            closure_of(model, model, 2 * step, None)()
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
            last = closure_of(model, model, 2 * step + 1, None)
            if is_split:
                optimizer.step(last)
            else:
                last()
                optimizer.step()
    assert whole_bits(models[0]) == whole_bits(models[1])


@pytest.mark.parametrize("held_back", [False, True])
@pytest.mark.parametrize("method", MASKED)
def test_a_closures_gradient_is_added_to_those_that_are_there(
    run: Run, method: str, held_back: bool
) -> None:
    run(2, _add_to_gradients, method, held_back)
