"""benchmarks/wire/time_to_loss.py: trainings with a curve, what is made of steps and seconds."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qsdp.data.corpus import load_corpus

NAMES = ["fsdp-fp32", "ddp-fp32", "ddp-powersgd-fp32", "qsdp-w4g4-once-fp32"]


# Trainings.


@pytest.mark.slow
def test_validation_on_the_way_changes_no_number_of_the_training(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, ranks, steps = load("support.losses"), load("support.ranks"), load("support.steps")
    monkeypatch.setitem(steps.MODELS, "1m", (1, 64))
    for name, tokens in (("EVAL_TOKENS", 64), ("CURVE_TOKENS", 32)):
        monkeypatch.setattr(losses, name, tokens)
    text = tmp_path / "text.txt"
    text.write_text("the loss at the end of a training is that of its own steps\n" * 60)
    arguments = argparse.Namespace(
        loss_model="1m",
        loss_steps=20,
        tokens=16,
        context=8,
        groups=0,
        contestants=NAMES,
        without=[],
        device="cpu",
        powersgd_rank=1,
    )
    rates = set()

    def train(one: Any, evals: int, seed: int) -> dict[str, Any]:
        arguments.loss_evals, arguments.loss_seed = evals, seed
        made = []
        row = losses.train(
            replace(one, make=lambda setting: made.append(one.make(setting)) or made[0]),
            world,
            load_corpus(text),
            arguments,
        )
        rates.update(group["lr"] for group in made[0].optimizer.param_groups)
        del row["seconds"]
        return row

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        world = ranks.Ranks(
            rank=0, size=1, device=torch.device("cpu"), control=None, mesh=mesh, alone=mesh
        )
        for one in load("support.contestants").trained(arguments):
            plain, often, other = train(one, 0, 0), train(one, 4, 0), train(one, 0, 1)
            assert [step for step, _ in often["curve"]] == [5, 10, 15, 20]
            assert often["curve"][0][1] > often["curve"][-1][1]
            assert often | {"curve": []} == plain
            assert other["val_loss"] != plain["val_loss"]
    finally:
        dist.destroy_process_group()
    assert [*rates] == [pytest.approx(steps.LR / 10)]


def test_validations_are_spread_evenly_and_the_last_comes_last(load: Any) -> None:
    eval_steps = load("support.losses").eval_steps
    assert eval_steps(300, 0) == []
    assert eval_steps(300, 4) == [75, 150, 225, 300]
    assert eval_steps(7, 7) == [1, 2, 3, 4, 5, 6, 7]
    assert eval_steps(10, 4)[-1] == 10


# Steps and seconds.


@pytest.mark.parametrize(
    ("curve", "steps"),
    [
        ([(10, 3.0), (20, 2.0), (30, 1.0)], 15),
        ([(10, 3.0), (20, 2.5), (30, 2.0)], 20),
        ([(10, 3.0), (20, 2.0), (30, 3.0), (40, 1.0)], 15),  # the first time counts
        ([(10, 2.0), (20, 1.0)], 10),  # nothing is known of what came before
        ([(10, None), (20, 2.0)], 20),
        ([(10, 3.0), (20, None), (30, 2.6)], None),
        ([], None),
    ],
)
def test_steps_to_a_loss(load: Any, curve: Any, steps: float | None) -> None:
    assert load("wire.time_to_loss_table").steps_to(curve, 2.5) == steps


def test_a_mean_over_seeds_is_none_where_a_seed_is(load: Any) -> None:
    mean = load("wire.time_to_loss_table").mean_curve
    assert mean([[(5, 1.0), (10, 2.0)], [(5, 2.0), (10, None)]]) == [(5, 1.5), (10, None)]


def _row(name: str, *seconds: float) -> dict[str, Any]:
    role = "ours" if name.startswith("qsdp") else "rival"
    return {"name": name, "what": name, "role": role, "seconds": [*seconds]}


def _link(link: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "link": link,
        "hosts": 2,
        "ranks": 2,
        "tokens": 384,
        "parameters": 8e5,
        "rows": [*rows],
    }


def _losses(**curves: list[tuple[int, float | None]]) -> dict[str, Any]:
    settings = {"loss_steps": 40, "loss_evals": 4, "data": "stdlib", "schedule": "a schedule"}
    rows = {name.replace("_", "-"): {"curve": curve} for name, curve in curves.items()}
    return {"settings": settings, "rows": rows}


def test_a_link_s_seconds_are_steps_times_its_step(load: Any) -> None:
    table = load("wire.time_to_loss_table")
    fsdp = [(10, 4.0), (20, 3.0), (30, 2.0), (40, 1.9)]
    first = _losses(
        fsdp_fp32=fsdp,
        ddp_fp32=fsdp,
        ddp_powersgd_fp32=[(10, 4.0), (20, 3.5), (30, 2.5), (40, 1.5)],
        qsdp_w4g4_once_fp32=[(10, 4.0), (20, 3.0), (30, 2.5), (40, 2.2)],
    )
    second = json.loads(json.dumps(first))
    second["rows"]["qsdp-w4g4-once-fp32"]["curve"][3][1] = 1.7
    slow = _link(
        "100mbit",
        _row("fsdp-fp32", 2.0, 9.0, 1.0),
        _row("ddp-fp32", 1.0),
        _row("ddp-powersgd-fp32", 0.2),
        _row("qsdp-w4g4-once-fp32", 0.1),
    )
    record = {"links": [slow], "losses": [first, second]}
    record |= table.judge(record)
    rows = {row["name"]: row for row in record["links"][0]["rows"]}
    assert record["target"] == 2.0
    assert rows["fsdp-fp32"]["to_loss_s"] == 60.0
    assert rows["ddp-fp32"]["to_loss_s"] == 30.0
    # The first 4 of its 35 steps are sent as DDP sends them.
    assert rows["ddp-powersgd-fp32"]["to_loss_s"] == pytest.approx(4 * 1.0 + 31 * 0.2)
    ours = rows["qsdp-w4g4-once-fp32"]
    assert record["curves"]["qsdp-w4g4-once-fp32"][3] == (40, pytest.approx(1.95))
    assert ours["steps"] == pytest.approx(30 + 10 * 0.5 / 0.55)
    assert ours["seed_steps"] == [None, pytest.approx(30 + 10 * 0.5 / 0.8)]
    assert table.best_rival(record["links"][0]["rows"])["name"] == "ddp-powersgd-fp32"
    *_, last = table.table(record).splitlines()
    steps, of_seeds, seconds, of_first, of_best, loss = last.split()[-6:]
    assert (steps, of_seeds, loss) == ("39", "36-never", "1.950")
    assert float(seconds) == pytest.approx(ours["to_loss_s"], abs=0.05)
    assert float(of_first[:-1]) == pytest.approx(60 / ours["to_loss_s"], abs=0.01)
    assert float(of_best[:-1]) == pytest.approx(10.2 / ours["to_loss_s"], abs=0.01)


def test_who_never_gets_there_has_no_seconds(load: Any) -> None:
    table = load("wire.time_to_loss_table")
    fsdp = [(10, 4.0), (20, 3.0), (30, 2.0), (40, 1.9)]
    behind = [(10, 4.0), (20, 3.0), (30, 2.5), (40, None)]
    link = _link("loopback", _row("fsdp-fp32", 2.0), _row("qsdp-w4g4-once-fp32", 0.1))
    record = {
        "links": [link],
        "losses": [_losses(fsdp_fp32=fsdp, qsdp_w4g4_once_fp32=behind)],
    }
    record |= table.judge(record)
    *_, last = table.table(record).splitlines()
    assert last.split()[2:] == ["never", "never", "not", "finite"]
    assert "one seed, which says little" in table.in_words(record)
    record["losses"] = [_losses(fsdp_fp32=[(10, None)] * 4)]
    with pytest.raises(RuntimeError, match="fsdp-fp32 is not finite"):
        table.judge(record)


# The program.


@pytest.fixture
def run(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run it with these flags, into ``out``."""
    program = load("wire.time_to_loss")
    monkeypatch.setattr(program, "exit_on_termination", lambda: None)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 300)

    def by_flags(*flags: str) -> None:
        argv = ["time_to_loss.py", "--out", str(tmp_path / "out"), "--data", str(text), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        program.main()

    return by_flags


@pytest.mark.slow
def test_links_are_taken_in_turn_and_every_seed_is_trained_once(
    load: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    program, seen = load("wire.time_to_loss"), []

    def take_turns(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
        seen.append((arguments.rate, path.name))
        assert (arguments.model, arguments.tokens, arguments.context) == (
            arguments.loss_model,
            arguments.loss_tokens,
            64,
        )
        assert arguments.vocab_size == len(set("to be or not to be\n"))
        rows = [_row(name, 0.5) for name in arguments.contestants]
        return _link("", *rows) | {"settings": {}}

    def take_losses(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
        seen.append((arguments.loss_seed, path.name))
        curve = [(10 * step, 4.0 - step) for step in (1, 2, 3, 4)]
        return _losses(**dict.fromkeys(arguments.contestants, curve))

    monkeypatch.setattr(program, "take_turns", take_turns)
    monkeypatch.setattr(program, "take_losses", take_losses)
    run("--short", "--seeds", "2", "--contestants", "alone-fp32", "fsdp-*", "qsdp-w4g4-once-fp32")
    assert seen == [
        ("100mbit", "turns-100mbit.json"),
        ("loopback", "turns-loopback.json"),
        (0, "losses-0.json"),
        (1, "losses-1.json"),
    ]
    record = json.loads((tmp_path / "out" / "time_to_loss.json").read_text())
    assert [link["link"] for link in record["links"]] == ["100mbit", "loopback"]
    names = [row["name"] for row in record["links"][0]["rows"]]
    assert "alone-fp32" not in names
    assert "fsdp-alone-fp32" not in names
    assert record["links"][0]["rows"][0]["to_loss_s"] == 15.0
    assert (tmp_path / "out" / "time_to_loss.png").stat().st_size > 1000
    assert "link loopback; the best rival: fsdp-" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--rates 1gbit 0mbit", "--rates is '0mbit'"),
        ("--hosts 0", "--hosts is 0"),
        ("--seeds 0", "--seeds is 0"),
        ("--steps 19", "--steps is 19"),
        ("--evals 6", "multiple of 4"),
        ("--steps 20 --evals 24", "at most --steps"),
        ("--tokens 100", "multiple of 64"),
        ("--without fsdp-fp32", "leave fsdp-fp32 out"),
        ("--contestants nobody", "leave none of alone-fp32"),
        ("--data nowhere.txt", "nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(
    run: Any, capsys: Any, flags: str, named: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*flags.split())
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert named in message
    assert message.count("\n") == 1
