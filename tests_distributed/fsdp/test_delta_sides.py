"""Asides beside weights that stay gathered, blocks that rest, and ends that are interrupted."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

import qsdp
from qsdp.fsdp import passes
from tests_distributed.support.delta import installed, take_sgd_step
from tests_distributed.support.helpers import make_batch
from tests_distributed.support.running import Run

CONFIG: dict[str, Any] = {"weight_bits": 4, "grad_bits": 8}


def _validated_before() -> list[float]:
    """Losses of passes of weights that a validation has gathered, and that stay so for a while.

    The block that is used twice is gathered again between its backward passes.
    """
    model, handle = installed(4, CONFIG, reshard=False, again=True)
    losses = []
    for aside in (nullcontext, handle.aside, nullcontext):
        with aside():
            with torch.no_grad():
                model(*make_batch(model, 1))
            losses.append(take_sgd_step(model, 2, 0.0))
    return losses


def test_a_pass_is_on_the_side_of_weights_that_were_gathered_before_it(run: Run) -> None:
    for losses in run(2, _validated_before):
        assert losses == pytest.approx([losses[0]] * 3, rel=0.1)


def _rested() -> list[float]:
    """Losses of passes in which a block rests that was used on the other side."""
    model, handle = installed(4, CONFIG)
    losses = []
    for aside in (nullcontext, handle.aside, nullcontext, handle.aside):
        with aside():
            losses.append(take_sgd_step(model, 2, 0.0))
        model.resting = frozenset() if model.resting else frozenset([1])
    return losses


def test_a_block_that_rests_has_no_side(run: Run) -> None:
    for losses in run(2, _rested):
        assert losses[::2] == pytest.approx([losses[0]] * 2, rel=0.1)


def _interrupted_exit() -> tuple[dict[str, str], float]:
    """What a pass is told of the weights after asides whose ends were interrupted."""
    model, handle = installed(5, CONFIG)
    take_sgd_step(model, 0, 0.1)
    sides = {"aside": handle.aside, "exact": handle.exact}
    found = {}
    for name, side in sides.items():
        inside = side()
        inside.__enter__()
        with (
            mock.patch.object(passes, "reshard_module", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            inside.__exit__(None, None, None)
        found[name] = str(handle._passes.facts.of_payloads([0])["weights"])
    return found, take_sgd_step(model, 1, 0.1)


def test_an_aside_whose_end_is_interrupted_ends(run: Run) -> None:
    for found, loss in run(2, _interrupted_exit):
        assert found == {"aside": "quantized", "exact": "quantized"}
        assert loss == loss


def _kept_behind_a_warm_up(warmup_steps: int) -> int:
    """Bytes that are kept after steps of CrAM, of which each takes two of the clock."""
    warm_up = {"warmup_steps": warmup_steps, "warmup_bits": 32} if warmup_steps else {}
    model, handle = installed(3, CONFIG | warm_up)
    optimizer = qsdp.CrAM(model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.5)

    def closure() -> Any:
        loss = model(*make_batch(model, 0))
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return handle.kept_bytes


def test_what_a_warm_up_kept_is_freed_behind_it(run: Run) -> None:
    sizes = [run(2, _kept_behind_a_warm_up, steps) for steps in (0, 1, 2)]
    assert sizes[1] == sizes[2] == sizes[0]
