"""What goes on after it, and what stays as it was, where changes are sent."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.comm import transport
from tests_distributed.support.delta import installed, take_sgd_step
from tests_distributed.support.helpers import full_state, make_batch
from tests_distributed.support.running import Run

CONFIG = {"weight_bits": 4, "grad_bits": 32}


def _apart_once(gather: str) -> dict[str, Tensor]:
    """What a training leaves in which ranks are at different calls once."""
    model, handle = installed(3, {**CONFIG, "gather": gather})
    take_sgd_step(model, 0, 0.1)
    with pytest.raises(RuntimeError, match=r"handle\.abandon_step"):
        handle.abandon_step() if dist.get_rank() else take_sgd_step(model, 1, 0.1)
    model.zero_grad()
    take_sgd_step(model, 1, 0.1)
    return full_state(model)


@pytest.mark.parametrize("gather", ["twice", "delta"])
def test_ranks_that_were_at_different_calls_go_on_at_once(run: Run, gather: str) -> None:
    run(2, _apart_once, gather)


def _gradients(gather: str, num_others: int) -> dict[str, Tensor]:
    """Gradients of a pass; others' weights may be evaluated so often between its two halves."""
    model, _ = installed(4, {**CONFIG, "weight_bits": 8, "gather": gather})
    loss: Any = model(*make_batch(model, 0))
    if num_others:
        model.eval()
        model.reshard()
        before = [p.detach().to_local().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.to_local().mul_(0.5)
            for seed in range(num_others):
                model(*make_batch(model, seed))
            model.reshard()
            for p, values in zip(model.parameters(), before, strict=True):
                p.to_local().copy_(values)
        model.train()
    loss.backward()
    return {
        name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None
    }


def _furthest(gather: str) -> float:
    plain, other = (_gradients(gather, num_others) for num_others in (0, 2))
    return max(float((plain[n] - other[n]).abs().max() / plain[n].abs().max()) for n in plain)


@pytest.mark.parametrize("gather", ["once", "twice", "delta"])
def test_a_backward_pass_has_the_weights_of_its_forward_pass(run: Run, gather: str) -> None:
    """Weights may be drawn on another grid, but are not those that were evaluated meanwhile."""
    assert max(run(2, _furthest, gather)) < 0.1


def _collectives_of_a_state() -> int:
    """Collectives that ``state_dict`` enters while a gather is under way that has a rest."""
    model, handle = installed(5, {**CONFIG, "weight_bits": 8})
    for step in range(6):
        take_sgd_step(model, step, 0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().mul_(3.0)
    model.blocks[1].unshard(async_op=True)
    with mock.patch.object(
        transport, "start_all_gather", side_effect=transport.start_all_gather
    ) as started:
        handle.state_dict()
    return started.call_count


def test_a_rank_may_ask_for_the_state_alone(run: Run) -> None:
    assert run(2, _collectives_of_a_state) == [0, 0]
