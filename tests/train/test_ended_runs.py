"""A run that replaces another, ended anywhere: the folder of results is of one of the two."""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qsdp import checkpoint
from qsdp.commands import train
from tests.support.bad_inputs import TEXT
from tests.support.ends import weights
from tests.support.file_operations import State, Tree, debris, full_disk, put_back, states, tree

pytestmark = [pytest.mark.usefixtures("world_of_one", "brief_ends", "no_peak"), pytest.mark.slow]

STEPS = 3
NUM_RESTARTS = 1
RATES = {"old": 1e-3, "new": 3e-3}
# What two runs of one command have in common.
SAME = ("step", "loss", "val_loss", "lr", "grad_norm", "tokens", "wire_bytes_sent")


def flags(out: Path, which: str, *more: str) -> list[str]:
    return [
        *("--data", str(out.parent / "text.txt"), "--out", str(out), "--steps", str(STEPS)),
        *("--model", "tiny", "--seq-len", "8", "--batch-size", "2", "--eval-batches", "1"),
        *("--one-shot", "none", "--warmup-steps", "1", "--eval-every", "2", "--save-every", "1"),
        *("--keep", "3", "--lr", str(RATES[which]), *more),
    ]


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = out / name
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn
        found.append({name: line[name] for name in SAME if name in line})
    return found


def rate_of(path: Path) -> float:
    """Which run's checkpoint is at ``path``. Raises ValueError if it is not whole."""
    content = tuple(sorted(tree(path).items()))
    if content not in _RATES:
        checkpoint.verify(path)
        _RATES[content] = float(checkpoint.read_meta(path)["config"]["lr"])
    return _RATES[content]


_RATES: dict[tuple[tuple[str, bytes | None], ...], float] = {}


def summary(out: Path) -> dict[str, Any] | None:
    path = out / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


@dataclass
class Replaced:
    """A finished run in ``out``, and one that replaces it."""

    out: Path
    command: list[str]
    old: Tree
    old_lines: list[dict[str, Any]]
    new_lines: list[dict[str, Any]]
    new_weights: dict[str, torch.Tensor]
    new_summary: dict[str, Any]

    def work(self) -> None:
        train.main(self.command)

    def is_old_whole(self) -> bool:
        """Whether all of the old run is there."""
        folder = self.out / "checkpoints"
        paths = [folder / f"step-{step:08d}" for step in range(1, STEPS + 1)]
        if not all(path.exists() and rate_of(path) == RATES["old"] for path in paths):
            return False
        current = tree(self.out)
        files = ("metrics.jsonl", "config.toml", "summary.json")
        return all(current.get(name) == self.old[name] for name in files)

    def new_step(self) -> int | None:
        """The last step that the new run has a checkpoint of."""
        found = checkpoint.steps(self.out / "checkpoints").items()
        return max((s for s, path in found if rate_of(path) == RATES["new"]), default=None)

    def check(self) -> None:
        """See that the old run is all there until the new one has a checkpoint.

        Then that one is, with its lines, whatever ended the new run.
        """
        assert checkpoint.latest(self.out / "checkpoints") is not None
        step = self.new_step()
        assert step is not None or self.is_old_whole(), "neither run is there"
        config = tomllib.loads((self.out / "config.toml").read_text())
        assert config["lr"] in RATES.values()
        found = lines(self.out)
        num = len(found)
        assert [line["step"] for line in found] == list(range(1, num + 1))
        assert found in (self.old_lines[:num], self.new_lines[:num]), "lines of two histories"
        names = [path.name for path in self.out.glob("metrics*.jsonl")]
        assert step is None or any(
            lines(self.out, n)[:step] == self.new_lines[:step] for n in names
        ), "whoever finds a checkpoint finds the lines of its steps"

    def check_summary(self) -> None:
        """No summary is of a run whose end is not there."""
        told = summary(self.out)
        if told is not None and told["config"]["lr"] == RATES["old"]:
            last = self.out / "checkpoints" / f"step-{STEPS:08d}"
            assert rate_of(last) == RATES["old"], "a summary of a run that is not there any more"

    def check_end(self) -> None:
        assert not debris(self.out)
        assert lines(self.out) == self.new_lines
        newest = checkpoint.latest(self.out / "checkpoints")
        assert newest is not None
        for name, weight in weights(newest).items():
            assert torch.equal(weight, self.new_weights[name])
        told = summary(self.out)
        assert told is not None
        assert {name: told[name] for name in self.new_summary} == self.new_summary


@pytest.fixture
def how() -> str:
    """``anew``, or ``back`` to the first step."""
    return "anew"


@pytest.fixture
def replaced(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Replaced:
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    train.main(flags(out, "old"))
    old, old_lines = tree(out), lines(out)
    first = out / "checkpoints" / f"step-{1:08d}"
    source = "none" if how == "anew" else str(first)
    command = flags(out, "new", "--resume", source)
    train.main(command)
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    told = summary(out)
    assert told is not None
    expected = {name: told[name] for name in ("val_loss", "steps", "sparsity", "method", "config")}
    found = Replaced(out, command, old, old_lines, lines(out), weights(newest), expected)
    assert found.new_lines != old_lines
    put_back(out, old)
    return found


def sample(found: list[State], number: int) -> list[State]:
    """Some states, so that their names are as many kinds as can be, and the first ones."""
    before, probing, *of_names = {tuple(state.content): state for state in found}.values()
    return [before, probing, *random.sample(of_names, min(number, len(of_names)))]


def is_mixed(state: State) -> bool:
    """Whether the new run has a checkpoint, and its metrics have not taken their name."""
    rates = [
        json.loads(data)["config"]["lr"]
        for name, data in state.content.items()
        if re.fullmatch("checkpoints/step-.*/meta.json", name) and data
    ]
    is_beside = any(re.fullmatch(r"metrics\..*\.jsonl", name) for name in state.content)
    return is_beside and RATES["new"] in rates


def at_each(run: Replaced, found: list[State], do: Callable[[], None]) -> None:
    for state in found:
        put_back(run.out, state.content)
        try:
            do()
        except Exception as error:
            raise AssertionError(f"{state.when}: {sorted(state.content)}") from error


@pytest.mark.parametrize("how", ["anew", pytest.param("back", marks=pytest.mark.heavy)])
def test_a_run_that_ends_anywhere_leaves_the_old_run_or_the_new_one(replaced: Replaced) -> None:
    found = states(replaced.out, replaced.work)

    def check() -> None:
        replaced.check()
        replaced.check_summary()

    at_each(replaced, found, check)

    def restart() -> None:
        replaced.work()
        replaced.check_end()

    at_each(replaced, sample(found, NUM_RESTARTS), restart)


def test_a_run_that_ends_twice_leaves_the_old_run_or_the_new_one(replaced: Replaced) -> None:
    mixed = [state for state in states(replaced.out, replaced.work) if is_mixed(state)]
    assert mixed
    put_back(replaced.out, random.choice(mixed).content)
    at_each(replaced, states(replaced.out, replaced.work), replaced.check)


@pytest.fixture
def no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the process group was left")


@pytest.mark.usefixtures("no_group_left")
@pytest.mark.parametrize(("how", "where"), [("anew", "checkpoints"), ("back", ".")])
def test_a_run_that_finds_no_room_leaves_the_old_one_where_it_was(
    replaced: Replaced, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [name for name in tree(replaced.out) if name.startswith("checkpoints")]
    needs = ("open", "write", "mkdir", "fsync")  # names can be changed on a full disk
    for after in (2, 8, 20):
        put_back(replaced.out, replaced.old)
        with full_disk(replaced.out / where, after, needs), pytest.raises(SystemExit) as stop:
            replaced.work()
        assert stop.value.code == 2
        assert re.fullmatch(r"error: .*No space left.*\n", capsys.readouterr().err)
        replaced.check()
        if replaced.is_old_whole():
            assert [n for n in tree(replaced.out) if n.startswith("checkpoints")] == places


def test_a_summary_of_another_run_does_not_end_this_one(replaced: Replaced) -> None:
    command = [*replaced.command, "--save-every", "0"]

    found = states(replaced.out, lambda: train.main(command))
    mixed = [state for state in found if is_mixed(state) and "summary.json" in state.content]
    assert mixed
    put_back(replaced.out, mixed[0].content)
    train.main([*flags(replaced.out, "new"), "--save-every", "0"])
    told = summary(replaced.out)
    assert told is not None
    assert told["config"]["lr"] == RATES["new"]
    assert told["val_loss"] == replaced.new_summary["val_loss"]
