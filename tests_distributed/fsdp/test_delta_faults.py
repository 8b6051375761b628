"""Where one rank has lost a frame of changes, or differs, all ranks say so, and can go on."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from qsdp import ops
from qsdp.comm import transport
from tests_distributed.support.delta import (
    decoded,
    installed,
    same_on_all_ranks,
    take_sgd_step,
)
from tests_distributed.support.helpers import full_state, make_batch
from tests_distributed.support.one_rank import (
    FORWARD,
    UP,
    Point,
    Stage,
    assert_said,
    differs,
    forward,
    say_at_each,
    train,
)
from tests_distributed.support.running import Run, selection

CONFIG = {"weight_bits": 4, "grad_bits": 8, "delta_redraw_every": 3}
DELTA = {"gather": "delta"}


def _thaw(stage: Stage) -> None:
    stage.parameter(UP).requires_grad_(True)
    stage.forward()


def _freeze(stage: Stage) -> None:
    stage.parameter(UP).requires_grad_(False)
    stage.forward()


def _freeze_before(stage: Stage) -> None:
    stage.parameter(UP).requires_grad_(False)
    stage.train()


def _load_another_step(stage: Stage) -> None:
    stage.handle.load_state_dict(stage.handle.state_dict() | {"step": 7, "reduced": 0})
    stage.forward()


POINTS = {
    "frozen before the first step": Point(
        there=_freeze,
        elsewhere=forward,
        says=differs(FORWARD, "frozen parameters", UP, "none"),
        config=DELTA,
    ),
    "frozen": Point(
        before=train,
        there=_freeze,
        elsewhere=train,
        says=differs(FORWARD, "frozen parameters", UP, "none"),
        config=DELTA,
    ),
    "trained again": Point(
        before=_freeze_before,
        there=_thaw,
        elsewhere=forward,
        says=differs(FORWARD, "frozen parameters", "none", UP),
        config=DELTA,
    ),
    "a state loaded": Point(
        before=train,
        there=_load_another_step,
        elsewhere=forward,
        says=differs(FORWARD, "step", "7", "1"),
        config=DELTA,
    ),
}


def said(odd: int) -> dict[str, str]:
    """What this rank says at each point."""
    return say_at_each(POINTS, odd)


@selection("ranks,odd", [(3, -1)], [2, 3], [0, -1])
def test_when_one_rank_differs_all_raise_one_sentence(run: Run, ranks: int, odd: int) -> None:
    assert_said(POINTS, run(ranks, said, odd), odd)


# --- a frame that is lost ---------------------------------------------------------------------


@contextmanager
def _fails_to_apply(model: Any, error: type[BaseException]) -> Iterator[list[str]]:
    """Inside, the first frame of the forward pass's last group cannot be applied."""
    apply, failed, is_armed = ops.apply_changes, [], False

    def apply_or_fail(*args: Any) -> None:
        if is_armed and not failed:
            failed.append("here")
            raise error("an interruption")
        apply(*args)

    def arm(*_: object) -> None:
        nonlocal is_armed
        is_armed = True

    hook = model.blocks[-1].norm2.register_forward_hook(arm)
    with mock.patch.object(ops, "apply_changes", apply_or_fail):
        yield failed
    hook.remove()


def _lost(error: type[BaseException], odd: int, trains: bool) -> dict[str, Any]:
    """What this rank says after a frame that rank ``odd`` loses, and how it goes on."""
    model, handle = installed(6, CONFIG)
    for step in range(2):
        take_sgd_step(model, step, 0.1)
    is_odd = dist.get_rank() == odd
    with torch.set_grad_enabled(trains):
        if is_odd:
            with _fails_to_apply(model, error) as failed, pytest.raises(error):
                model(*make_batch(model, 2))
            assert failed
        else:
            model(*make_batch(model, 2))
    if error is KeyboardInterrupt:  # of which torch's modules tell no hook: the pass is not over
        handle.abandon_step()
    try:
        take_sgd_step(model, 3, 0.1)
        heard = "nothing"
    except RuntimeError as found:
        heard = str(found)
    present = torch.ones(())
    dist.all_reduce(present)  # no collective is half done
    assert present == dist.get_world_size()
    model.zero_grad()
    handle.abandon_step()
    losses = [take_sgd_step(model, step, 0.1) for step in range(4, 6)]
    weights, exact = decoded(model), full_state(model)
    name = "blocks.1.mlp.up.weight"
    return {
        "heard": heard,
        "same": same_on_all_ranks(weights),
        "near": float((weights[name] - exact[name]).abs().max() / exact[name].abs().max()),
        "losses": losses,
    }


@selection(
    ("error", "odd", "trains"),
    [(KeyboardInterrupt, 1, True), (RuntimeError, 0, False), (LookupError, 2, True)],
    (KeyboardInterrupt, RuntimeError, LookupError),
    (0, 1, 2),
    (False, True),
)
def test_a_lost_frame_is_named_by_all_ranks_and_training_goes_on_after_it(
    run: Run, error: type[BaseException], odd: int, trains: bool
) -> None:
    everyone = run(3, _lost, error, odd, trains)
    for found in everyone:
        kept = f"rank {odd or 1} is at a forward pass with kept codes .*, but rank 0 with .*\\."
        assert re.fullmatch(kept, found["heard"])
        assert found["same"]
        assert found["near"] < 0.3
        assert all(loss == loss for loss in found["losses"])


def _other_bytes(odd: int, byte: int, bit: int) -> list[str]:
    """What this rank says in each step; ``odd`` sees the first frame with a bit flipped."""
    model, _ = installed(6, CONFIG)
    wait, is_damaged = transport.Arrival.wait, False

    def damaged_on_the_way(arrival: Any) -> torch.Tensor | None:
        nonlocal is_damaged
        seen = wait(arrival)
        # Not what ranks agree on before they send frames.
        if seen is not None and seen.dtype == torch.uint8 and not is_damaged:
            seen.view(-1)[byte] ^= 1 << bit
            is_damaged = True
        return seen

    said = []
    sees = damaged_on_the_way if dist.get_rank() == odd else wait
    with mock.patch.object(transport.Arrival, "wait", sees):
        for step in range(2):
            try:
                take_sgd_step(model, step, 0.1)
            except RuntimeError as error:
                said.append(str(error))
                model.zero_grad()
    assert is_damaged == (dist.get_rank() == odd)
    return said


@selection("where,odd", [("raw", 1), ("codes", 0)], ["raw", "codes"], [0, 1, 2])
def test_bytes_that_one_rank_alone_has_otherwise_are_found_by_all(
    run: Run, where: str, odd: int
) -> None:
    # Behind the header and the bitmap of rank 0's frame come a norm, then counts, then data.
    begin, end = {"raw": (60, 80), "codes": (150, 230)}[where]
    byte, bit = random.randrange(begin, end), random.randrange(8)
    for said in run(3, _other_bytes, odd, byte, bit):
        assert len(said) == 1, (byte, bit)  # the step after it is whole again
        assert re.fullmatch(rf"rank {odd or 1} .*\.", said[0])
        assert "kept codes" in said[0]


# --- what all ranks do ---------------------------------------------------------------------------


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
