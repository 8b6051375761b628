"""What auto.py, scaling.py, miniature.py make of what they measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qsdp.train.auto.cost_model import CODED, STOCK, WireWay

PREDICTED = {"fsdp-fp32": 3.0, "qsdp-w8g8-once-fp32": 1.5, "qsdp-w4g4-once-fp32": 1.4}


def _row(name: str, *seconds: float, role: str = "rival") -> dict[str, Any]:
    return {
        "name": name,
        "what": name,
        "role": role,
        "shards": name.startswith(("fsdp", "zero3", "qsdp")),
        "seconds": [*seconds],
        "sent_bytes": [0],
    }


def _chosen(name: str) -> dict[str, Any]:
    return {"choice": name, "line": "why", "took_s": 9.0, "predicted_s": PREDICTED}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_way_that_auto_may_take_is_a_contestant(load: Any, precision: str) -> None:
    names = [one.name for one in load("support.contestants").contestants()]
    ways = [WireWay(bits=STOCK)]
    ways += [WireWay(bits=bits, gather=gather) for bits in CODED for gather in ("twice", "once")]
    found = [load("wire.auto").contestant(str(way), precision) for way in ways]
    assert len(set(found)) == len(ways)
    assert set(found) <= set(names)


@pytest.mark.parametrize(("ours", "is_met"), [(1.09, True), (1.12, False)])
def test_a_choice_is_held_against_the_best_of_each_kind(
    load: Any, ours: float, is_met: bool
) -> None:
    rows = [
        _row("alone-fp32", 0.1, 0.1, 0.1, role="floor"),
        _row("fsdp-fp32", 3.0, 6.0, 3.0),
        _row("ddp-fp32", 1.0, 2.0, 1.0),
        _row("zero3-fp32", 2.0, 4.0, 2.0),
        _row("qsdp-w8g8-once-fp32", ours, 2 * ours, ours, role="ours"),
        _row("qsdp-w4g4-once-fp32", 1.0, 2.0, 1.0, role="ours"),
    ]
    found = [_chosen("qsdp-w8g8-once-fp32"), _chosen("qsdp-w4g4-once-fp32")]
    auto = load("wire.auto")
    judged = auto.verdicts("1gbit", found, {"rows": rows})
    took, eight, four = judged[0], judged[1:4], judged[4:]
    assert (took["value"], took["is_met"]) == (9.0, True)
    assert [verdict["value"] for verdict in eight] == pytest.approx([ours, ours / 2, ours])
    assert [verdict["is_met"] for verdict in eight] == [is_met, True, is_met]
    assert [verdict["value"] for verdict in four] == pytest.approx([1.0, 0.5, 1.0])
    assert "chosen 1 of 2 times" in four[0]["what"]
    facts = {"rate": "1gbit", "parameters": 19e6, "ranks": 2, "tokens": 1024}
    lines = auto.table(facts | {"choices": found, "rows": rows, "verdicts": judged}).splitlines()
    assert sum(line.endswith("<- chosen") for line in lines) == 2
    assert sum("MISSED" in line for line in lines) == 2 * (not is_met)


def test_growth_is_told_in_ratios_of_the_same_rounds(load: Any, tmp_path: Path) -> None:
    scaling = load("cost.scaling")
    row = {
        "axis": "ranks",
        "model": "5m",
        "parameters": 5e6,
        "ranks": 2,
        "groups": 6,
        "seconds": {scaling.THEIRS: [1.0, 2.0]},
        "of_fsdp": {scaling.OURS: [0.5, 0.7], scaling.OTHER: [0.8, 0.8]},
        "memory_bytes": {scaling.THEIRS: 100e6, scaling.OURS: 125e6, scaling.OTHER: 110e6},
    }
    line = scaling.line(row)
    assert "1500.0 ms" in line
    assert "W8G8 0.60 of it (0.50-0.70), memory 1.25" in line
    assert "W4G4 0.80 of it (0.80-0.80), memory 1.10" in line
    pytest.importorskip("matplotlib")
    assert scaling.plot([row, row | {"ranks": 4}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_papers_links_as_its_communication_over_its_computation(load: Any) -> None:
    miniature = load("wire.miniature")
    # 15.6 GB at 10 Gbit/s; 8192 tokens of 1.3e9 parameters at 40 Tflop/s.
    assert miniature.ratio(10) == pytest.approx(12.48 / 1.845, rel=0.01)
    assert miniature.ratio(100) == pytest.approx(miniature.ratio(10) / 10)
    named = {point["name"]: point["ratio"] for point in miniature.points([10, 100])}
    assert set(named) == {"10gbit", "100gbit", "implied"}
    # A quarter of the communication, nothing overlapped.
    implied = named["implied"]
    assert (1 + implied) / (1 + implied / 4) == pytest.approx(2.2)


@pytest.mark.parametrize(
    ("tool", "flags", "said"),
    [
        ("wire.auto", ["--rates", "5"], "--rates is '5'"),
        ("wire.auto", ["--hosts", "1"], "--hosts is 1: give at least 2"),
        ("wire.auto", ["--choices", "0"], "--choices is 0: give at least 1"),
        ("wire.auto", ["--tokens", "5"], "--tokens is 5: give at least 256"),
        ("wire.auto", ["--groups", "3"], "--groups is 3, but auto chooses for blocks"),
        ("cost.scaling", ["--ranks", "0"], "--ranks has 0: give numbers of at least 1"),
        ("cost.scaling", ["--ranks", "--models", "--groups-of"], "there is nothing to measure"),
        ("wire.miniature", ["--gbit", "0"], "--gbit has 0.0: give numbers of at least 0.1"),
        ("wire.miniature", ["--gbit", "inf"], "--gbit has inf: give numbers of at least 0.1"),
        ("wire.miniature", ["--hosts", "1"], "--hosts is 1: give at least 2"),
        ("cost.startup", ["--jobs", "0"], "--jobs is 0: give at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(
    load: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tool: str,
    flags: list[str],
    said: str,
) -> None:
    out = [] if tool == "cost.startup" else ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *flags, *out])
    with pytest.raises(SystemExit) as end:
        load(tool).main()
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


def test_what_was_chosen_takes_part_and_may_not_be_left_out(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    auto = load("wire.auto")
    found = [_chosen("qsdp-w4g4-once-fp32")]
    given: list[str] = []

    def take_turns(arguments: Any, path: Path) -> dict[str, Any]:
        given[:] = arguments.contestants
        assert path == tmp_path / "turns-1gbit.json"
        return {"rows": [_row(name, 1.0) for name in PREDICTED]}

    monkeypatch.setattr(auto, "choices", lambda _: found)
    monkeypatch.setattr(auto, "take_turns", take_turns)
    monkeypatch.setattr(sys, "argv", ["auto.py", "--out", str(tmp_path), "--device", "cpu"])
    arguments = auto.parse()
    link = auto.on_link("1gbit", arguments)
    assert given == [*PREDICTED, "ddp-fp32", "ddp-powersgd-fp32", "zero3-fp32"]
    assert link["choices"] == found
    assert all(verdict["is_met"] for verdict in link["verdicts"])
    arguments.without = ["qsdp-w4*"]
    with pytest.raises(auto.Mistake, match="leaves out qsdp-w4g4-once-fp32, which auto chose"):
        auto.on_link("1gbit", arguments)


def test_a_point_of_growth_is_a_race_and_a_job_for_each_ones_memory(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scaling = load("cost.scaling")
    calls = []

    def take_turns(arguments: Any, path: Path) -> dict[str, Any]:
        calls.append((path.name, arguments.hosts, [*arguments.contestants]))
        rows = [_row(name, 2.0 + place) for place, name in enumerate(arguments.contestants)]
        peak = 100 if arguments.contestants == [scaling.THEIRS] else 150
        facts = {"parameters": 5e6, "ranks": arguments.hosts, "groups": 6}
        return facts | {"rows": rows, "peak_bytes": peak, "bare_bytes": 50}

    monkeypatch.setattr(scaling, "take_turns", take_turns)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--out", str(tmp_path)])
    arguments = scaling.parse()
    everyone = [scaling.THEIRS, scaling.OURS, scaling.OTHER]
    found = scaling.point(arguments, "ranks-4", {"hosts": 4, "model": "5m"})
    assert calls[0] == ("ranks-4.json", 4, everyone)
    assert calls[1:] == [(f"ranks-4-{name}.json", 4, [name]) for name in everyone]
    assert found["of_fsdp"] == {scaling.THEIRS: [1.0], scaling.OURS: [1.5], scaling.OTHER: [2.0]}
    assert [found["memory_bytes"][name] for name in everyone] == [50, 100, 100]
    assert arguments.contestants == everyone  # the next point has them all again
