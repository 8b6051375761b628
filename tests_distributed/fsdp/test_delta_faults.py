"""Where one rank has lost a frame of changes, or differs, all ranks say so, and can go on."""

from __future__ import annotations

import random
import re
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from qsdp import ops
from qsdp.comm import transport
from tests_distributed.support.delta import (
    decoded,
    fails_to_apply,
    installed,
    interrupted_at,
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
from tests_distributed.support.two_replicas import refusal_of

CONFIG = {"weight_bits": 4, "grad_bits": 8, "delta_redraw_every": 3}
DELTA = {"gather": "delta"}
NODES = {"reduce": "two-hop", "ranks_per_node": 2, "delta_codes": "node"}
CODES: dict[str, dict[str, Any]] = {"rank": CONFIG, "node": CONFIG | NODES}
"""Configs by where codes are kept."""


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


def _lost(error: type[BaseException], odd: int, trains: bool, codes: str) -> dict[str, Any]:
    """What this rank says after a frame that rank ``odd`` loses, and how it goes on."""
    model, handle = installed(6, CODES[codes])
    for step in range(2):
        take_sgd_step(model, step, 0.1)
    is_odd, is_mate = dist.get_rank() == odd, codes == "node" and dist.get_rank() == odd ^ 1
    with torch.set_grad_enabled(trains):
        if is_odd:
            with fails_to_apply(model, error) as failed, pytest.raises(error):
                model(*make_batch(model, 2))
            assert failed
        else:  # the other rank of a node has its rows from the odd one
            told = refusal_of(lambda: model(*make_batch(model, 2)))
            assert f"rank {odd} cannot" in told if is_mate else told == "nothing"
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
    ("error", "odd", "trains", "codes"),
    [
        *((KeyboardInterrupt, 1, True, "rank"), (RuntimeError, 0, False, "rank")),
        (LookupError, 2, True, "rank"),
    ],
    (KeyboardInterrupt, RuntimeError, LookupError),
    (0, 1, 2),
    (False, True),
    tuple(CODES),
)
def test_a_lost_frame_is_named_by_all_ranks_and_training_goes_on_after_it(
    run: Run, error: type[BaseException], odd: int, trains: bool, codes: str
) -> None:
    everyone = run(4 if codes == "node" else 3, _lost, error, odd, trains, codes)
    for found in everyone:
        kept = rf"rank {odd or 1} is at a forward pass with the digest of kept codes .*"
        assert re.match(kept, found["heard"])
        assert f"lost in an interruption of rank {odd}" in found["heard"]
        assert found["same"]
        assert found["near"] < 0.3
        assert all(loss == loss for loss in found["losses"])


def _interrupted_everywhere() -> tuple[list[str], list[bool]]:
    """Every rank is interrupted while it applies frames of the same group, each at another one."""
    model, handle = installed(6, {**CONFIG, "delta_redraw_every": 1000})
    return interrupted_at(model, handle, dist.get_rank())


def test_ranks_that_are_interrupted_at_other_frames_do_not_part_in_silence(run: Run) -> None:
    for said, same in run(3, _interrupted_everywhere):
        assert all("kept codes" in sentence for sentence in said)
        assert len(same) >= 2
        assert all(same)


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


# --- a frame that cannot be made ----------------------------------------------------------------


def _cannot_encode(odd: int, codes: str) -> tuple[str, list[bool]]:
    """What this rank says where the codec fails on rank ``odd``, and how it goes on."""
    model, _ = installed(6, CODES[codes])
    take_sgd_step(model, 0, 0.1)
    said = "nothing"
    fails = mock.patch.object(ops, "encode_changes", side_effect=RuntimeError("no memory."))
    with fails if dist.get_rank() == odd else nullcontext():
        try:
            model(*make_batch(model, 1))
        except RuntimeError as error:
            said = str(error)
    same = []
    for step in range(1, 3):
        take_sgd_step(model, step, 0.1)
        same.append(same_on_all_ranks(decoded(model)))
    return said, same


@pytest.mark.parametrize(
    ("ranks", "odd", "codes"), [(3, 0, "rank"), (3, 2, "rank"), (4, 1, "node")]
)
def test_all_ranks_hear_of_one_that_cannot_make_its_frame(
    run: Run, ranks: int, odd: int, codes: str
) -> None:
    for rank, (said, same) in enumerate(run(ranks, _cannot_encode, odd, codes)):
        told = f"rank {odd} cannot send its part of the group of .*\\."
        assert re.fullmatch("no memory." if rank == odd else told, said)
        assert same == [True, True]
