"""The wire's whole state, in one dictionary that torch saves: a training goes on from it."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from qsdp.fsdp.whole_state import load_whole_state, whole_state
from tests_distributed.support.going_on import Setting, Training
from tests_distributed.support.running import Run

SETTINGS = {
    "uneven": Setting(options={"width": 20}),
    "masked": Setting(share=0.5),
    "replicas": Setting(replicas=2),
    "learned": Setting(config={"levels": "learned", "grad_bits": 4, "level_steps": (2, 6)}),
}
TWICE = Setting(config={"gather": "twice", "delta_redraw_every": None})


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def _going_on(name: str) -> tuple[Any, Any]:
    """What the steps after a save come to, in the training and in one that has loaded."""
    setting = SETTINGS[name]
    training = Training(setting)
    training.take(range(5))
    saved, state = training.save(), _through_a_file(whole_state(training.handle))
    other = Training(setting, replace(saved, grids={}))
    load_whole_state(other.handle, state)
    later = range(5, 9)
    return training.take(later), other.take(later)


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (3, "uneven"),
        (2, "masked"),
        pytest.param(4, "replicas", marks=pytest.mark.heavy),
        pytest.param(2, "learned", marks=pytest.mark.heavy),
    ],
)
def test_a_training_goes_on_bit_for_bit(run: Run, ranks: int, name: str) -> None:
    for went_on, resumed in run(ranks, _going_on, name):
        assert went_on == resumed


def _of_others() -> tuple[list[str], Any]:
    """What is said of grids with other buckets, and whether all were drawn anew."""
    state = whole_state(Training(SETTINGS["uneven"]).handle)
    other = Training(Setting(config={"bucket_size": 24}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_whole_state(other.handle, state)
    epochs = {float(g.full_tensor().max()) for n, g in other.handle.grids().items() if "epoch" in n}  # type: ignore[attr-defined]
    return [str(each.message) for each in seen], epochs


def test_grids_that_do_not_fit_are_said_and_drawn_anew(run: Run) -> None:
    (first, epochs), (second, _) = run(2, _of_others)
    assert len(first) == 1
    assert "of another number of ranks, or of other bits" in first[0]
    assert second == []
    assert epochs == {0.0}


def _refused(state: Any) -> str:
    try:
        load_whole_state(Training(TWICE).handle, state)
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize("state", [None, {}, {"state": {}, "grids": {}, "more": 1}])
def test_what_is_no_whole_state_is_refused(run: Run, state: Any) -> None:
    assert {*run(1, _refused, state)} == {
        f"the state of the wire is {type(state).__name__} without 'state' and 'grids': give what "
        "whole_state() has returned."
    }
