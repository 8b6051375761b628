"""What ``handle.aside()`` promises where changes are sent: sides, supports, memory."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

import qsdp
from qsdp.fsdp import passes
from tests_distributed.support.delta import installed, sent_while, take_sgd_step
from tests_distributed.support.helpers import make_batch
from tests_distributed.support.one_rank import (
    BACKWARD,
    FORWARD,
    Point,
    Stage,
    assert_said,
    differs,
    say_at_each,
    train,
)
from tests_distributed.support.running import Run

CONFIG: dict[str, Any] = {"weight_bits": 4, "grad_bits": 8}
DELTA = {"gather": "delta", **CONFIG}


def _train_aside(stage: Stage) -> None:
    with stage.handle.aside():
        stage.train()


def _go_back_aside(stage: Stage) -> None:
    loss = stage.forward()
    with stage.handle.aside():
        torch.autograd.backward(loss)


def _go_back_outside(stage: Stage) -> None:
    with stage.handle.aside():
        loss = stage.forward()
    torch.autograd.backward(loss)


POINTS = {
    "a pass aside": Point(
        before=train,
        there=_train_aside,
        elsewhere=train,
        says=differs(FORWARD, "weights", "aside", "quantized"),
        config=DELTA,
    ),
    "a backward pass aside": Point(
        before=train,
        there=_go_back_aside,
        elsewhere=train,
        says=differs(BACKWARD, "weights", "aside", "quantized"),
        config=DELTA,
    ),
    "a backward pass outside": Point(
        before=train,
        there=_go_back_outside,
        elsewhere=_train_aside,
        says=differs(BACKWARD, "weights", "quantized", "aside"),
        config=DELTA,
    ),
}


def _said(odd: int) -> dict[str, str]:
    return say_at_each(POINTS, odd)


def test_when_one_rank_alone_is_aside_all_raise_one_sentence(run: Run) -> None:
    assert_said(POINTS, run(2, _said, 1), 1)


def _crossed() -> tuple[list[str], list[float]]:
    """What is said where a backward pass is on the other side, and losses of steps after it."""
    model, handle = installed(1, CONFIG)
    said, losses = [], []
    for step, sides in enumerate([(nullcontext, handle.aside), (handle.aside, nullcontext)]):
        forward, backward = sides
        with forward():
            loss: Any = model(*make_batch(model, step))
        with pytest.raises(RuntimeError) as raised, backward():
            loss.backward()
        said.append(str(raised.value))
        model.zero_grad()
        losses.append(take_sgd_step(model, step, 0.1))
    del loss, raised
    return said, losses


def test_a_backward_pass_on_the_other_side_is_refused_and_training_goes_on(run: Run) -> None:
    everyone = run(2, _crossed)
    for said, losses in everyone:
        assert re.search("was outside .* is inside: ", said[0])
        assert re.search("was inside .* is outside: ", said[1])
        assert len(losses) == 2
    assert [said for said, _ in everyone] == [everyone[0][0]] * 2


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


def _interrupted_exit() -> tuple[dict[str, str], float]:
    """What a pass is told of the weights after asides whose ends were interrupted."""
    model, handle = installed(5, CONFIG)
    take_sgd_step(model, 0, 0.1)
    sides = {"aside": handle.aside, "exact": handle.exact}
    found = {}
    for name, side in sides.items():
        with pytest.raises(KeyboardInterrupt), side():
            interrupted = mock.patch.object(passes, "reshard_module", side_effect=KeyboardInterrupt)
            interrupted.start()
        interrupted.stop()
        found[name] = str(handle._passes.facts.of_payloads([0])["weights"])
    return found, take_sgd_step(model, 1, 0.1)


def test_an_aside_whose_end_is_interrupted_ends(run: Run) -> None:
    for found, loss in run(2, _interrupted_exit):
        assert found == {"aside": "quantized", "exact": "quantized"}
        assert loss == loss


def _drawn_again() -> list[int]:
    """Buckets that are drawn after another support aside, and after a part of the old one."""
    model, handle = installed(2, CONFIG)
    masks = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("blocks.") and p.dim() == 2:
                masks[p] = p.to_local().abs() > 0.15
                p.to_local().masked_fill_(~masks[p], 0.0)
    handle.set_support(masks)
    take_sgd_step(model, 0, 0.0)
    with handle.aside():
        handle.set_support(None)
        with torch.no_grad():
            model(*make_batch(model, 1))
        handle.set_support({p: mask.clone() for p, mask in masks.items()})
    found = []
    for step, chosen in enumerate((masks, dict(list(masks.items())[1:]))):
        handle.set_support(chosen)
        counts = sent_while(handle, lambda step=step: take_sgd_step(model, step, 0.0))  # type: ignore[misc]
        found.append(counts["redrawn_buckets"])
    return found


def test_masks_that_hold_again_after_an_aside_draw_nothing_anew(run: Run) -> None:
    for same, fewer in run(2, _drawn_again):
        assert same == 0
        assert fewer > 0


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
