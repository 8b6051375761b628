"""benchmarks/wire/changes.py says what crossed the interface: its arithmetic and its cases."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

PARAMETERS, STEPS = 1000, 10


def a_case(bits: float, grads: float, framing: float = 1.0, **more: Any) -> dict[str, Any]:
    """What two ranks find whose weights cost so many bits a step, and gradients so many bytes."""
    gather, reduce = (STEPS * PARAMETERS / 2 * each for each in (bits / 8, grads))
    return {
        "model": "nano",
        "weight_bits": 4,
        "grad_bits": 4,
        "lr": 1e-3,
        "steps": 1000,
        "since": 100,
        "to": 100 + STEPS,
        "ranks": 2,
        "parameters": PARAMETERS,
        "coded": 900,
        "counted_gather": gather,
        "counted_reduce": reduce,
        "seen": framing * (gather + reduce),
        "changed_codes": 9 * STEPS,
    } | more


def test_bytes_a_parameter_are_those_of_all_weights_and_all_gradients(load: Any) -> None:
    table = load("wire.changes_table")
    case = a_case(0.24, 0.53, framing=1.02)
    assert table.gather_bits(case) == pytest.approx(0.24)
    assert table.step_bytes(case) == pytest.approx(1.02 * (0.03 + 0.53))
    assert table.difference(case) == pytest.approx(0.02)
    assert table.changed_share(case) == pytest.approx(0.01)  # of the steps that are counted


@pytest.mark.parametrize(
    ("case", "limits"),
    [
        (a_case(0.2, 0.5), [0.36, 0.62]),
        (a_case(0.2, 0.5, grad_bits=3), [0.36, 0.50]),
        (a_case(0.2, 0.5, model="19m"), [0.30, 0.60]),
        (a_case(2.0, 0.5, weight_bits=8), [2.5]),
        (a_case(0.2, 0.5, lr=3e-3), []),
        (a_case(0.2, 0.5, steps=60), []),
    ],
)
def test_limits_are_of_the_cases_that_have_them(
    load: Any, case: dict[str, Any], limits: list[float]
) -> None:
    table = load("wire.changes_table")
    found = table.verdicts([case], 1e-3, 1000, 100)
    assert [verdict["at_most"] for verdict in found] == limits
    assert table.name_of(case) in table.table([case])


def test_more_than_a_limit_misses_it(load: Any) -> None:
    gather, step = load("wire.changes_table").verdicts([a_case(0.37, 0.58)], 1e-3, 1000, 100)
    assert not gather["is_met"]
    assert not step["is_met"]


def test_readings_from_another_step_on_have_no_limits(load: Any) -> None:
    late = a_case(0.1, 0.1) | {"since": 900}
    assert load("wire.changes_table").verdicts([late], 1e-3, 1000, 100) == []


def test_cases_have_names_of_their_own_and_stop_where_they_are_to(load: Any) -> None:
    changes = load("wire.changes")
    runs = changes.plan(
        argparse.Namespace(
            models=["nano", "19m"],
            parts=["bytes", "rates"],
            steps=1000,
            since=100,
            batch_size=6,
            data="some/text.txt",
        )
    )
    assert len({run.name for run in runs}) == len(runs) == 13
    ends = {(run.settings["model"], run.settings["to"]) for run in runs}
    assert ends == {("nano", 1000), ("19m", 140)}
    assert {run.settings["data"] for run in runs} == {"text.txt"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--since", "0"], "--since is 0"),
        (["--steps", "100"], "--steps is 100"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--rate", "fast"], "'fast'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    load: Any,
    monkeypatch: Any,
    capsys: Any,
    tmp_path: Path,
    options: list[str],
    named: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["changes", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit) as ended:
        load("wire.changes").main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1
