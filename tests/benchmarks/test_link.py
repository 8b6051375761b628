"""benchmarks/wire/link.py says what it measured: ratios, targets, kept rounds, refusals."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

ROLES = {"alone": "floor", "fsdp-alone": "yardstick", "waiting": "yardstick", "qsdp": "ours"}


def _raced(name: str, *seconds: float, **parts: float) -> dict[str, Any]:
    kind = next((kind for kind in ("fsdp-alone", *ROLES) if name.startswith(kind)), "rival")
    return {
        "name": name,
        "what": name,
        "role": ROLES.get(kind, "rival"),
        "shards": name.startswith(("fsdp-", "zero3-", "qsdp-")),
        "seconds": [*seconds],
        "sent_bytes": [0 for _ in seconds],
        "parts": [parts for _ in seconds],
    }


def _race(link: str, *rows: dict[str, Any], hosts: int = 2) -> dict[str, Any]:
    return {
        "link": link,
        "hosts": hosts,
        "ranks": hosts,
        "tokens": 1024,
        "parameters": 19.2e6,
        "rows": [*rows],
    }


# Ratios and targets.


@pytest.mark.parametrize(("ours", "is_met"), [(1.0, True), (0.99, True), (1.01, False)])
def test_a_speed_up_is_taken_round_by_round(load: Any, ours: float, is_met: bool) -> None:
    rows = [
        _raced("fsdp-fp32", 7.5, 15.0, 7.5),
        _raced("qsdp-w8g8-once-fp32", 1.6, 3.2, 1.6),
        _raced("qsdp-w4g4-once-fp32", ours, 2 * ours, ours),
    ]
    targets = load("wire.link_targets")
    four, eight = targets.verdicts(_race("100mbit", *rows))
    assert four["value"] == pytest.approx(7.5 / ours)
    assert (four["is_met"], four["limit"]) == (is_met, 7.5)
    assert eight["value"] == pytest.approx(7.5 / 1.6)
    assert not eight["is_met"]
    assert ("MISSED" in targets.in_words(four)) == (not is_met)
    assert targets.verdicts(_race("100mbit", *rows, hosts=4)) == []


@pytest.mark.parametrize(
    ("link", "parameters", "limits"),
    [
        ("100mbit", 19.2e6, [9.0, 1.0, 1.35]),
        ("20mbit", 4.87e6, [20.0]),
        ("20mbit", 19.2e6, []),
        ("100mbit", 4.87e6, []),
    ],
)
def test_changed_codes_have_targets_of_their_own_by_link_and_model(
    load: Any, link: str, parameters: float, limits: list[float]
) -> None:
    rows = [
        _raced("alone-fp32", 1.0),
        _raced("fsdp-fp32", 7.0),
        _raced("qsdp-w4g4-once-fp32", 1.6),
        _raced("qsdp-w4g4-delta-fp32", 1.4),
    ]
    record = _race(link, *rows) | {"parameters": parameters}
    found = load("wire.link_targets").verdicts(record)
    ours = [verdict for verdict in found if "delta" in verdict["what"]]
    assert [verdict["limit"] for verdict in ours] == limits
    if len(limits) == 3:
        assert [verdict["value"] for verdict in ours] == pytest.approx([5.0, 1.6 / 1.4, 1.4])
        assert [verdict["is_met"] for verdict in ours] == [False, True, False]


@pytest.mark.parametrize(("ours", "is_met"), [(1.09, True), (1.11, False)])
def test_a_slow_down_is_against_the_best_that_shards(load: Any, ours: float, is_met: bool) -> None:
    rows = [
        _raced("fsdp-alone-fp32", 0.1),
        _raced("ddp-fp32", 0.2),  # shards nothing
        _raced("fsdp-fp32", 2.0),
        _raced("zero3-fp32", 1.0),
        _raced("qsdp-w8g8-once-fp32", ours),
        _raced("qsdp-w4g4-once-fp32", 3.0),
    ]
    (verdict,) = load("wire.link_targets").verdicts(_race("loopback", *rows))
    assert (verdict["value"], verdict["is_met"]) == (pytest.approx(ours), is_met)


def test_every_row_is_held_against_fsdp2_and_the_best_of_both_kinds(load: Any) -> None:
    table = load("wire.link_table")
    record = _race(
        "100mbit",
        _raced("alone-fp32", 1.0),
        _raced("fsdp-alone-fp32", 1.1),
        _raced("fsdp-fp32", 18.0),
        _raced("ddp-powersgd-fp32", 2.0),
        _raced("zero3-fp32", 12.0),
        _raced("qsdp-w4g4-once-fp32", 3.0),
    )
    found = {name: row["name"] for name, row in table.references(record).items()}
    assert [*found.values()] == ["fsdp-fp32", "zero3-fp32", "ddp-powersgd-fp32"]
    *_, ours = table.table(record).splitlines()
    assert ours.split()[-3:] == ["6.00x", "4.00x", "0.67x"]


def test_a_slow_contestant_is_compared_in_the_rounds_that_it_was_in(load: Any) -> None:
    slow, fast = _raced("fsdp-fp32", 12.0, 12.0, 12.0), _raced("q", 1.0, 2.0, 3.0, 1e-9, 1e-9)
    assert load("wire.link_table").ratio(slow, fast) == 6.0


@pytest.mark.parametrize(("wire", "is_met"), [(0.28, True), (0.2, False), (0.4, False)])
def test_parts_and_computation_make_the_step(load: Any, wire: float, is_met: bool) -> None:
    parts = {f"{way}_{phase}_s": 0.0 for way in ("gather", "reduce") for phase in ("encode",)}
    parts |= {"gather_wire_s": wire, "reduce_wire_s": 0.0, "gather_decode_s": 0.0}
    rows = [
        _raced("alone-fp32", 0.5),
        _raced("fsdp-alone-fp32", 0.6),
        _raced("fsdp-alone-bf16", 5.0),
        _raced("qsdp-w8g8-once-fp32", 1.0, **parts, reduce_decode_s=0.1),
    ]
    record = _race("1gbit", *rows)
    (verdict,) = load("wire.link_targets").adds_up(record)
    assert verdict["value"] == pytest.approx(abs(wire - 0.3))
    assert verdict["is_met"] == is_met
    table = load("wire.link_table")
    (one,) = table.explanations(record)
    assert one["copies_s"] == pytest.approx(0.1)
    assert one["sum_s"] == pytest.approx(0.7 + wire)
    assert table.explanation_table([one]).splitlines()[-1].endswith(f"{100 * (wire - 0.3):+.1f}%")


# Rounds that are kept.


def test_slow_contestants_leave_after_three_rounds_and_the_others_go_on(load: Any) -> None:
    due = load("support.rounds").due
    rounds = [{"slow": {"seconds": 10.1}, "fast": {"seconds": 9.9}} for _ in range(3)]
    assert due(rounds[:2], ["slow", "fast"], 5) == ["slow", "fast"]
    assert due(rounds, ["slow", "fast"], 5) == ["fast"]
    rounds += [{"fast": {"seconds": 99.0}}, {"fast": {"seconds": 1.0}}]
    assert due(rounds, ["slow", "fast"], 5) == []
    assert due(rounds, ["slow", "fast"], 6) == ["fast"]


def test_what_is_kept_is_of_the_same_settings(load: Any, tmp_path: Path) -> None:
    rounds, mistake = load("support.rounds"), load("support.runs").Mistake
    path = tmp_path / "turns.json"
    settings = {"link": "1gbit", "contestants": ("a", "b"), "code": "1f"}
    record = rounds.kept(path, settings, {"rounds": []})
    assert record["rounds"] == []
    rounds.write_json(path, record | {"rounds": [{}]})
    assert rounds.kept(path, settings, {"rounds": []})["rounds"] == [{}]
    for name in settings:
        with pytest.raises(mistake, match=f"{name} .*, not other"):
            rounds.kept(path, settings | {name: "other"}, {"rounds": []})
    with pytest.raises(mistake, match="more"):
        rounds.kept(path, settings | {"more": 1}, {"rounds": []})
    path.write_text('{"settings"')
    with pytest.raises(mistake, match="not a record"):
        rounds.kept(path, settings, {"rounds": []})


@pytest.mark.slow
def test_turns_add_the_rounds_that_are_missing(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, ranks = load("support.turns"), load("support.ranks")
    monkeypatch.setitem(load("support.steps").MODELS, "1m", (1, 64))
    monkeypatch.setattr("gc.freeze", lambda: None)
    out = tmp_path / "turns.json"
    names = ["alone-fp32", "fsdp-fp32", "ddp-powersgd-fp32", "qsdp-w4g4-once-fp32"]
    arguments = argparse.Namespace(
        model="1m",
        context=8,
        tokens=16,
        vocab_size=64,
        groups=0,
        warmup=0,
        settle=0,
        contestants=names,
        without=[],
        device="cpu",
        powersgd_rank=1,
        out=out,
    )
    turns.write_json(out, {"settings": {}, "rounds": []})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        world = ranks.Ranks(
            rank=0, size=1, device=torch.device("cpu"), control=None, mesh=mesh, alone=mesh
        )
        for arguments.rounds in (1, 3):
            turns.take_turns(arguments, world)
            record = json.loads(out.read_text())
            assert len(record["rounds"]) == arguments.rounds
            if arguments.rounds == 1:
                first = record["rounds"][0]
    finally:
        dist.destroy_process_group()
    assert record["rounds"][0] == first
    assert all([*taken] == names for taken in record["rounds"])
    assert all(taken[name]["seconds"] > 0 for taken in record["rounds"] for name in names)
    assert all(bool(taken[names[-1]]["parts"]) for taken in record["rounds"])
    assert record["facts"]["ranks"] == 1


# Contestants.


def test_names_are_unique_and_the_default_computes_in_fp32(load: Any) -> None:
    contestants = load("support.contestants")
    arguments = argparse.Namespace(contestants=None, without=[], device="cpu", powersgd_rank=7)
    everyone, chosen = contestants.contestants(7), contestants.chosen(arguments)
    assert len({one.name for one in everyone}) == len({one.what for one in everyone})
    assert len({one.name for one in everyone}) == len(everyone)
    assert {one.what.rpartition(" ")[2] for one in chosen} == {"fp32"}
    ours = {one.name for one in chosen if one.role == "ours"}
    bits, gathers = (32, 16, 8, 4), ("once", "twice")
    whole = {f"qsdp-w{b}g{b}-{gather}-fp32" for b in bits for gather in gathers}
    assert ours == whole | {f"qsdp-w{b}g{b}-delta-fp32" for b in (8, 4)}
    assert "DDP PowerSGD rank 7, fp32" in {one.what for one in chosen}
    arguments.device = "cuda"
    assert len(contestants.chosen(arguments)) == len(everyone)


@pytest.mark.parametrize("has_deepspeed", [True, False])
def test_the_short_form_is_a_floor_and_six(
    load: Any, monkeypatch: pytest.MonkeyPatch, has_deepspeed: bool
) -> None:
    link = load("wire.link")
    monkeypatch.setattr(link, "find_spec", lambda name: has_deepspeed or None)
    monkeypatch.setattr(sys, "argv", ["link.py", "--short", "--rounds", "2"])
    arguments = link.parse()
    assert (arguments.rate, arguments.rounds, arguments.settle) == ("100mbit", 2, 0)
    arguments.device = "cpu"
    roles = [one.role for one in load("support.contestants").chosen(arguments)]
    assert sorted(roles)[0] == "floor"
    assert len(roles) == 7


# What cannot be run.


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--rate 100mbitt", "'100mbitt'"),
        ("--rate 0mbit", "'0mbit'"),
        ("--rate loopback -- true", "loopback"),
        ("--short -- true", "--short"),
        ("--hosts 0", "--hosts is 0"),
        ("--nproc-per-node 0", "--nproc-per-node is 0"),
        ("--rounds 0", "--rounds is 0"),
        ("--warmup -1", "--warmup is -1"),
        ("--tokens 1000", "multiple of 256"),
        ("--tokens 0", "--tokens is 0"),
        ("--loss-tokens 100", "multiple of 64"),
        ("--loss-steps 3", "--loss-steps is 3"),
        ("--powersgd-rank 0", "--powersgd-rank is 0"),
        ("--device cuda --hosts 250", "250 ranks need a GPU each"),
        ("--contestants nobody", "leave none of alone-fp32"),
        ("--data nowhere.txt", "nowhere.txt cannot be read"),
        ("--report {out}", "no finished comparison"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: str, named: str
) -> None:
    before, *command = flags.format(out=tmp_path).split("-- ")
    argv = ["link.py", "--out", str(tmp_path), *before.split()]
    monkeypatch.setattr(sys, "argv", [*argv, *(["--", *command] if command else [])])
    link = load("wire.link")
    monkeypatch.setattr(link, "exit_on_termination", lambda: None)
    with pytest.raises(SystemExit) as ended:
        link.main()
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert named in message
    assert message.count("\n") == 1


# The table of several links.


def _finished(folder: Path, link: str, seconds: dict[str, float], **settings: Any) -> Path:
    rows = [_raced(name, taken, taken) for name, taken in seconds.items()]
    losses = {
        "settings": {"loss_steps": 300, "loss_tokens": 384, "data": "stdlib"},
        "rows": {
            name: {"train_loss": 2.0, "val_loss": 2.125, "parameters": 8e5} for name in seconds
        },
    }
    described = {"processor": "P", "cores": "2", "kernels": "k", "device": "cpu"}
    record = _race(link, *rows) | {
        "settings": {"link": link, "model": "19m", "code": "1f", "powersgd_rank": 4} | settings,
        "machine": described | {"torch": "2", "date": "today"},
        "losses": losses,
    }
    folder.mkdir()
    (folder / "link.json").write_text(json.dumps(record))
    return folder


def test_a_report_has_a_row_a_link(load: Any, tmp_path: Path) -> None:
    report = load("wire.link_report").report
    names = ["alone-fp32", "fsdp-fp32", "ddp-powersgd-fp32", "qsdp-w4g4-once-fp32"]
    slow = dict(zip(names, (1.0, 16.0, 2.0, 4.0), strict=True))
    fast = dict(zip(names, (1.0, 2.0, 3.0, 1.0 + random.random()), strict=True))
    first = _finished(tmp_path / "a", "100mbit", slow)
    second = _finished(tmp_path / "b", "loopback", fast, code="2e")
    lines = report([first, second]).splitlines()
    assert lines[2].startswith("| 100 Mbit/s | 1.00 | 16.00 | 2.00 | 4.00 | 4.00x |")
    assert lines[2].endswith("| 0.50x (ddp-powersgd-fp32) |")
    assert lines[3].startswith("| loopback |")
    assert lines[3].count("|") == lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "qsdp W4G4 2.125" in "\n".join(lines)
    assert "different states of the code" in lines[-1]
    assert "different states" not in report([first])


def test_a_report_is_of_one_model_and_machine(load: Any, tmp_path: Path) -> None:
    report, mistake = load("wire.link_report").report, load("support.runs").Mistake
    seconds = {"alone-fp32": 1.0, "fsdp-fp32": 2.0, "qsdp-w4g4-once-fp32": 1.5}
    first = _finished(tmp_path / "a", "100mbit", seconds)
    for number, changes in enumerate(({"model": "5m"}, {"powersgd_rank": 8}, {"extra": 1})):
        other = _finished(tmp_path / f"b{number}", "1gbit", seconds, **changes)
        with pytest.raises(mistake, match=next(iter(changes))):
            report([first, other])
    with pytest.raises(mistake, match="is of 100mbit, as one before it"):
        report([first, _finished(tmp_path / "c", "100mbit", seconds)])
