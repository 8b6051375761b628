"""A run that a scheduler tells to end saves what it has done, ends with status 0, and goes on."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from qsdp import checkpoint
from qsdp.commands import exit
from qsdp.commands.exit import leave
from qsdp.commands.train import main
from qsdp.common.user_errors import UserError
from qsdp.report.metrics import read_metrics
from qsdp.train import loop, setup, world
from qsdp.train.signals import SIGNALS, handling_signals
from qsdp.train.validate import Evaluator
from tests.support import patience
from tests.support.bad_inputs import TEXT
from tests.support.ends import told

DATA = ["--model", "tiny", "--seq-len", "8", "--batch-size", "2", "--eval-batches", "1"]
FLAGS = [*DATA, "--cram", "--qsdp-bits", "8", "--steps", "7", "--eval-every", "2"]
FLAGS += ["--save-every", "5", "--one-shot", "0.5,0.7"]
ACDC = [*DATA, "--acdc", "--steps", "12", "--acdc-warmup", "2", "--acdc-phase", "2"]
ACDC += ["--acdc-last-dense", "3", "--acdc-last-sparse", "3", "--eval-every", "0"]
ACDC += ["--warmup-steps", "1", "--one-shot", "none", "--save-every", "0"]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``run(flags, name)``: train in the folder ``name``; what was printed."""
    (tmp_path / "text.txt").write_text(TEXT)

    def train(flags: list[str], name: str = "told") -> str:
        handlers = [signal.getsignal(number) for number in SIGNALS]
        main(["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / name), *flags])
        assert handlers == [signal.getsignal(number) for number in SIGNALS]
        return capsys.readouterr().out

    return train


def weights(root: Path) -> tuple[int, list[bytes]] | None:
    """The newest checkpoint's step, weights and states."""
    path = checkpoint.latest(root)
    if path is None:
        return None
    return checkpoint.read_meta(path)["step"], [p.read_bytes() for p in path.glob("*.distcp")]


def outcome(out: Path) -> Any:
    """All numbers that a run has left, but for times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = r"step|loss|val_loss.*|lr|grad_norm|pruned"
    losses = [{k: v for k, v in line.items() if re.fullmatch(names, k)} for line in lines]
    summary = json.loads((out / "summary.json").read_text())
    found = [summary[name] for name in ("val_loss", "val_loss_quantized", "one_shot", "sparsity")]
    return weights(out / "checkpoints"), weights(out / "dense-twin"), losses, found


# Where and in which call a signal comes, which, and after which step the run is left.
MOMENTS: list[tuple[Any, str, int, list[signal.Signals], int]] = [
    (setup, "parallelize", 1, [signal.SIGTERM], 0),
    (loop, "run_micro_batches", 2, [signal.SIGUSR1], 1),  # a second pass
    (loop, "run_micro_batches", 1, [signal.SIGTERM, signal.SIGUSR1], 2),  # a validation follows
    (Evaluator, "loss", 1, [signal.SIGTERM], 4),
    (checkpoint, "save", 1, [signal.SIGUSR1, signal.SIGUSR1], 5),
    (loop, "run_micro_batches", 4, [signal.SIGTERM], 7),  # the last step
    (Evaluator, "loss", 1, [signal.SIGTERM], 7),  # the last evaluation
]


@pytest.mark.usefixtures("world_of_one", "brief_ends")
def test_a_signal_at_any_time_costs_nothing(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, saved = tmp_path / "told", []
    save = checkpoint.save

    def noted(root: Path, step: int, *args: Any, **kwargs: Any) -> None:
        saved.append(step)
        save(root, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", noted)
    for place, name, call, numbers, step in MOMENTS:
        with told(place, name, call, *numbers):
            printed = run(FLAGS).splitlines()
        assert printed[-1].startswith(f"{numbers[0].name}: ")
        done = (
            f"step {step} of 7 is saved" if step else "no step was taken; the same command begins"
        )
        assert done in printed[-1]
        assert not (out / "summary.json").exists()
    assert saved == [1, 2, 4, 5, 7]  # each once
    run(FLAGS)
    run(FLAGS, "whole")
    assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.usefixtures("world_of_one", "brief_ends")
def test_a_run_killed_in_the_validation_after_its_last_step_has_the_line_of_that_step(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, told(loop, "run_micro_batches", 3, signal.SIGTERM):
        patch.setattr(loop, "validate_in_loop", killed)
        with pytest.raises(Killed):
            run(FLAGS)
    dist.destroy_process_group()
    run(FLAGS)
    lines = read_metrics(tmp_path / "told" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.usefixtures("world_of_one", "brief_ends")
def test_a_signal_in_the_validation_of_a_dense_twin_ends_no_step(
    run: Callable[..., str], tmp_path: Path
) -> None:
    with told(Evaluator, "loss", 1, signal.SIGTERM):
        assert "SIGTERM: step 9 of 12 is saved" in run(ACDC)
    assert "Going on" in run(ACDC)
    run(ACDC, "whole")
    assert (found := outcome(tmp_path / "told")) == outcome(tmp_path / "whole")
    assert found[1] is not None


def test_signals_are_left_alone_by_a_thread_and_after_a_run() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    within = []

    def other() -> None:
        with handling_signals() as stop:
            within.extend(signal.getsignal(number) for number in SIGNALS)
            assert stop.asked is None

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert within == before
    with contextlib.suppress(ValueError), handling_signals() as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == signal.SIGUSR1
        raise ValueError("a mistake")
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("is_told", [False, True])
def test_what_comes_after_a_run_that_was_told_does_not_end_the_process(
    is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> None:
        with handling_signals():
            if is_told:
                signal.raise_signal(signal.SIGUSR1)

    before = [signal.getsignal(number) for number in SIGNALS]
    at_the_end: list[Any] = []

    def end(status: int) -> None:
        assert status == 0
        at_the_end.extend(signal.getsignal(number) for number in SIGNALS)

    monkeypatch.setattr("os._exit", end)
    try:
        with pytest.raises(SystemExit):
            exit.run(command)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert at_the_end == ([signal.SIG_IGN] * len(SIGNALS) if is_told else before)
    with handling_signals():
        signal.raise_signal(signal.SIGUSR1)
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.usefixtures("world_of_one")
def test_a_rank_that_waits_for_others_is_ended_by_a_signal(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Met(BaseException):
        pass

    def look(*_: Any, **__: Any) -> Any:
        assert before == [signal.getsignal(number) for number in SIGNALS]
        raise Met

    before = [signal.getsignal(number) for number in SIGNALS]
    for place, name in ((world, "_meet_nobody"), (dist, "barrier")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, look)
            with pytest.raises(Met):
                run(FLAGS)
    dist.destroy_process_group()


def test_a_rank_whose_launcher_has_spoken_leaves_without_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(exit, "_PATIENCE_S", 1e9)
    monkeypatch.setattr(exit, "_SHORT_PATIENCE_S", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with handling_signals():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            leave(UserError("a mistake of another rank"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == exit.EXIT_STATUS
    assert capsys.readouterr().err == ""


def test_ranks_meet_whatever_ranks_of_before_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    ranks = threading.local()
    monkeypatch.setattr(world, "rendezvous", lambda *_, **__: iter([(store, ranks.own, 2)]))
    monkeypatch.setattr(world, "_LOOK_AGAIN", timedelta(milliseconds=20))

    def meet(rank: int, met: dict[int, Any]) -> None:
        ranks.own = rank
        met[rank] = world._meet()[2]

    def leave_behind(left: int) -> None:
        """As much as ranks that were killed after so many writes."""
        if left > 0:
            store.set("qsdp/meeting", "earlier")
        if left > 1:
            dist.PrefixStore("qsdp/earlier", store).set("word-1", "hello")
        if left > 2:
            dist.PrefixStore("qsdp/earlier", store).set("words", json.dumps(["hello"]))

    for left in range(5):
        leave_behind(left)
        met: dict[int, Any] = {}
        threads = [threading.Thread(target=meet, args=(rank, met)) for rank in (1, 0)]
        for thread in threads:
            thread.start()
            time.sleep(0.03)  # the second rank comes first, and reads what is there
        for thread in threads:
            thread.join(patience.seconds())
        assert met.keys() == {0, 1}
        assert not met[1].check(["address"])
        met[0].set("address", "of rank 0")
        assert met[1].get("address") == b"of rank 0"
