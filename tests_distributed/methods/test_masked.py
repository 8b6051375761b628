"""AC/DC and gradual pruning over shards: steps of one process, moments, resumes, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from qsdp import checkpoint
from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.acdc.schedule import ACDCSchedule
from tests.support.masked_runs import BASES, SCHEDULE, SIZES
from tests.support.momentum import SCHEDULE as SHORT
from tests.support.momentum import Halves, KnowsNothing, Momentum, values_of
from tests_distributed.support.helpers import full_state, make_batch, make_model, shard
from tests_distributed.support.masked_steps import VARIANTS, backward, compare, whole_mask
from tests_distributed.support.running import Run, selection


def _bad_gradient_on_one_rank() -> None:
    model = shard(make_model(seed=3))
    optimizer = ACDC(model, BASES["adamw"](model.parameters()), schedule=SCHEDULE, target=0.8)
    for step in range(2):
        backward(model, model, step, [0])
        optimizer.step()
    backward(model, model, 2, [0])
    before = full_state(model)
    if dist.get_rank() == 1:
        model.blocks[0].qkv.weight.grad.to_local()[0, 0] = math.nan
    optimizer.step()
    assert (optimizer.num_steps, optimizer.skipped_steps) == (3, 1)
    assert not math.isfinite(optimizer.last_grad_norm or 0)
    after = full_state(model)
    masks = {name: whole_mask(mask) for name, mask in optimizer.masks().items()}
    for name, value in after.items():  # the phase begins all the same
        expected = before[name]
        assert torch.equal(value, torch.where(masks[name], expected, 0) if name in masks else value)
        assert name in masks or torch.equal(value, expected)


def _refuse_weights_that_stay_gathered() -> None:
    model = shard(make_model())
    optimizer = ACDC(model, torch.optim.SGD(model.parameters(), lr=0.1), schedule=20)
    model.set_reshard_after_backward(False)
    with pytest.raises(RuntimeError, match="set_reshard_after_backward"):
        optimizer.step()


def _moments_of_any_class() -> None:
    """Where shards are uneven and empty, and states of two kinds."""
    model = shard(make_model(seed=3))
    optimizer = ACDC(model, Momentum(model.parameters()), schedule=SHORT, target=0.8)
    for step in range(SHORT.steps):
        backward(model, model, step, [0])
        optimizer.step()
        moments = [values_of(state["exp_avg"]) for state in optimizer.state.values()]
        assert len(moments) == len([*model.parameters()])
        is_lifted = SHORT.is_compressed(step) and not SHORT.is_compressed(step + 1)
        assert any(moment.any() for moment in moments) != is_lifted


def _a_class_that_cannot_be_zeroed_on_one_rank() -> None:
    model = shard(make_model(seed=3))

    class Secretive(Momentum):
        kind = KnowsNothing if dist.get_rank() == 1 else Halves

        def __init__(self) -> None:
            super().__init__(model.parameters())

    optimizer = ACDC(model, Secretive(), schedule=SHORT, target=0.8)
    backward(model, model, 0, [0])
    optimizer.step()
    with pytest.raises((ValueError, RuntimeError), match="KnowsNothing, which cannot be set"):
        optimizer.step()


def _resumable(base: str, folder: Path, steps: range, resume: bool) -> Any:
    """Train on the four sequences of each step; the losses, and the masks at the end."""
    phases = ACDCSchedule.of(60, warmup=2, phase=6, last_dense=4, last_sparse=8)
    model = shard(make_model(seed=8 if resume else 7, tied=True))
    optimizer = ACDC(model, BASES[base](model.parameters()), schedule=phases, target=0.8)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    world_size, rank = dist.get_world_size(), dist.get_rank()
    masks = None
    if resume:
        checkpoint.load(folder / "step-00000005", model, optimizer)
        rates.last_epoch = optimizer.num_steps
        assert optimizer.num_steps == 5
        assert all(isinstance(mask, DTensor) for mask in optimizer.masks().values())
        assert all(mask.dtype == torch.bool for mask in optimizer.masks().values())
        masks = [whole_mask(mask) for mask in optimizer.masks().values()]
    losses = []
    for step in steps:
        if step == 5 and not resume:
            checkpoint.save(folder, 5, model, optimizer, {})
            masks = [whole_mask(mask) for mask in optimizer.masks().values()]
        model.zero_grad()
        tokens, targets = make_batch(model, seed=step, rank=0, batch_size=4)
        share = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
        loss = model(tokens[share], targets[share])
        loss.backward()
        optimizer.step()
        rates.step()
        loss = loss.detach() / world_size
        dist.all_reduce(loss)
        losses.append(loss.item())
    return losses, masks, [whole_mask(mask) for mask in optimizer.masks().values()]


@selection(
    "world_size, variant",
    [(2, "0.5+layer"), (2, "gmp"), (3, "2:4")],
    [2, 3, 4],
    tuple(VARIANTS),
)
def test_a_sharded_run_is_that_of_one_process(run: Run, world_size: int, variant: str) -> None:
    sizes = SIZES if variant == "2:4" else {}
    options = {**sizes, "tied": True, "frozen": world_size == 3, "conv1d": world_size != 2}
    run(world_size, compare, "fsdp", variant, options)


def test_replicas_and_ddp_take_the_same_steps(run: Run) -> None:
    run(4, compare, "hsdp", "2:4", {**SIZES, "conv1d": True})
    run(2, compare, "ddp", "0.9", {"tied": True})


def test_one_ranks_bad_gradient_skips_the_step_on_all(run: Run) -> None:
    run(2, _bad_gradient_on_one_rank)


def test_weights_that_stay_gathered_are_refused(run: Run) -> None:
    run(2, _refuse_weights_that_stay_gathered)


def test_first_moments_of_any_class_are_zeroed_or_refused_on_all_ranks(run: Run) -> None:
    run(4, _moments_of_any_class)
    run(2, _a_class_that_cannot_be_zeroed_on_one_rank)


@selection("base", [("adamw",)], tuple(BASES))
def test_a_run_goes_on_in_a_compressed_phase_on_more_ranks(
    run: Run, tmp_path: Path, base: str
) -> None:
    losses, masks, last = run(2, _resumable, base, tmp_path, range(16), False)[0]
    again, resumed, resumed_last = run(4, _resumable, base, tmp_path, range(5, 16), True)[0]
    assert not all(mask.all() for mask in masks)
    torch.testing.assert_close(again, losses[5:], rtol=0, atol=1e-5)
    for expected, found in ((masks, resumed), (last, resumed_last)):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
