"""What many_ranks.py times is what single calls of the operators give, and it knows its parts."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console


@pytest.fixture
def many_ranks(load: Any) -> Any:
    return load("cost.many_ranks")


@pytest.mark.parametrize("width", [1, 20])  # with 1 this rank has nothing of most parameters
def test_every_collective_is_timed_first_and_again_and_taken_apart(
    many_ranks: Any, width: int
) -> None:
    arguments = SimpleNamespace(ranks=[8], width=width, rounds=1)
    rows = many_ranks.measure(arguments)
    facts = {(row["collective"], row["is_pruned"], row["ranks"]) for row in rows}
    assert facts == {(kind, half, 8) for kind in ("gather", "reduce") for half in (False, True)}
    for row in rows:
        taken = {name: seconds for name, (seconds,) in row["seconds"].items()}
        assert min(taken[name] for name in ("first", "again", "python", "calls")) > 0
    text = io.StringIO()
    Console(file=text, width=120).print(many_ranks.table(rows, arguments))
    assert text.getvalue().count("half pruned") == 2


def test_the_time_of_the_stand_in_for_the_network_is_taken_off(
    many_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = many_ranks.Case(many_ranks.Gather, 8, 20, False)
    now = [0.0]
    monkeypatch.setattr(many_ranks.time, "thread_time", lambda: now[0])

    def call() -> None:
        now[0] += 3.0
        case._network.seconds += 1.0

    assert case._seconds(call, 5) == 2.0


@pytest.mark.parametrize("kind", ["Gather", "Reduce"])
def test_without_operators_a_collective_goes_through_and_decodes_nothing(
    many_ranks: Any, kind: str
) -> None:
    case = many_ranks.Case(getattr(many_ranks, kind), 8, 20, True)
    one = case._it
    one.output.fill_(7)
    with case._network.in_place():
        with many_ranks.operators(lambda _: many_ranks._nothing):
            one.once()
        assert (one.output == 7).all()
        case._call_all()
        assert (one.output == 7).all()
        one.once()
    assert torch.equal(one.output, one.expected)


@pytest.mark.parametrize("kind", ["Gather", "Reduce"])
@pytest.mark.parametrize("is_pruned", [False, True])
def test_a_collective_that_gives_something_else_is_not_timed(
    many_ranks: Any, monkeypatch: pytest.MonkeyPatch, kind: str, is_pruned: bool
) -> None:
    chosen = getattr(many_ranks, kind)
    once = chosen.once

    def damaged(one: Any) -> None:
        one.payloads[-1, 32:40] = 0  # the range of the first bucket that the last rank sends
        once(one)

    monkeypatch.setattr(chosen, "once", damaged)
    with pytest.raises(RuntimeError, match=f"a {kind.lower()} over 8 ranks gives other values"):
        many_ranks.Case(chosen, 8, 20, is_pruned)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "0"], "--rounds is 0: give at least 1."),
        (["--width", "0"], "--width is 0: give at least 1."),
        (["--ranks", "8", "1"], "--ranks has 1: give numbers of at least 2."),
    ],
)
def test_what_cannot_be_measured_is_refused(
    many_ranks: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["many_ranks.py", *flags])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(SystemExit) as end:
        many_ranks.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {said}\n"
