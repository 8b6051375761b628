"""What only records a run does not end it: metrics, events, plots, the summary, what is printed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import resource
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from qsdp import checkpoint
from qsdp.commands import exit, train
from qsdp.common.printing import forgiving_output
from qsdp.report import appended_lines
from qsdp.report.metrics import MetricsWriter
from qsdp.train.job import STEP_METRICS
from qsdp.train.loop import WIRE_METRICS, train_step
from tests.support.bad_inputs import TEXT
from tests.support.command_line import small_run
from tests.support.file_operations import refusing

LAUNCH = Path(__file__).parents[2] / "launch"


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@contextlib.contextmanager
def room_until(num_bytes: int) -> Iterator[None]:
    """Inside, a file of this process has no more bytes: the line that comes to there is torn."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Inside, what is put on disk does not come there, as file systems say that write later."""

    def fail(file: int) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


def write_steps(writer: MetricsWriter, numbers: range) -> None:
    for step in numbers:
        writer.log({"step": step, "loss": 1 / step})


def test_lines_wait_until_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, later = tmp_path / "metrics.a.jsonl", tmp_path / "metrics.jsonl"
    attempts: list[object] = []
    again = appended_lines.AppendedLines._open_again
    monkeypatch.setattr(
        appended_lines.AppendedLines, "_open_again", lambda lines: attempts.append(again(lines))
    )
    with MetricsWriter(path) as writer:
        write_steps(writer, range(1, 4))
        with room_until(path.stat().st_size + 10):
            write_steps(writer, range(4, 40))
            assert path.read_bytes()[-1:] != b"\n"
            assert not attempts
            writer.sync()
            assert attempts == [None]
            path.rename(later)
            writer.moved(later)
            assert [line["step"] for line in writer.history] == [*range(1, 40)]
        assert "cannot be written (File too large), but the run goes on" in capsys.readouterr().err
        writer.sync()
        assert steps(later) == [*range(1, 40)]
        assert "with all lines that waited.\n" in capsys.readouterr().err
        writer.log({"step": 40, "loss": 1.0})
        with no_sync():
            writer.sync()
        assert "cannot be written (No space left" in capsys.readouterr().err
        with later.open("r+b") as file:
            file.truncate(later.stat().st_size - 7)  # nor was all of it
    assert steps(later) == [*range(1, 41)]
    assert capsys.readouterr().err.endswith("with all lines that waited.\n")


def test_lines_that_wait_have_a_bound_and_lost_ones_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appended_lines, "_MOST_BYTES", 500)
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        write_steps(writer, range(1, 3))
        path.unlink()
        path.write_text("")  # another run's
        with no_sync():
            writer.sync()
        write_steps(writer, range(3, 100))
        kept = [line["step"] for line in writer.history]
        assert kept == [*range(100 - len(kept), 100)]
        assert len(kept) < 20
    assert path.read_text() == ""
    assert f"warning: 99 lines of {path} were never written.\n" in capsys.readouterr().err


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_file_that_is_gone_is_made_again(
    is_moved: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for last in (3, 6):
            write_steps(writer, range(last - 2, last + 1))
            path.rename(tmp_path / "elsewhere") if is_moved else path.unlink()
            writer.sync()
            assert steps(path) == [*range(1, last + 1)]
            said = f"warning: {path} was gone, and is there again with all its lines.\n"
            assert capsys.readouterr().err == said
        write_steps(writer, range(7, 8))
        path.unlink()
    assert steps(path) == [*range(1, 8)]


def test_a_file_that_is_gone_is_made_again_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(appended_lines, "_RETRY_S", 0.0)
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        write_steps(writer, range(1, 4))
        path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(appended_lines.shutil, "copyfileobj", refuse)
            writer.sync()
            write_steps(writer, range(4, 6))
        write_steps(writer, range(6, 7))
        assert steps(path) == [*range(1, 7)]
        with no_sync():
            writer.sync()
        path.unlink()  # beside another failure
        writer.sync()
        assert steps(path) == [*range(1, 7)]


def test_another_file_is_never_taken_for_the_one_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appended_lines, "_RETRY_S", 0.0)
    path, others = tmp_path / "metrics.jsonl", tmp_path / "others"
    with MetricsWriter(path) as writer:
        for number in range(1, 6):  # file systems use the numbers of closed files again
            write_steps(writer, range(number, number + 1))
            others.write_text("another run's\n" * 9)
            others.replace(path)
            writer.sync()
    assert path.read_text() == "another run's\n" * 9


def test_a_file_that_may_not_appear_again_is_missed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise ValueError("the folder is another run's now.")

    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, may_appear=refuse) as writer:
        write_steps(writer, range(1, 4))
        path.unlink()
        writer.sync()
        write_steps(writer, range(4, 6))
        writer.sync()
    assert not path.exists()
    first, last = capsys.readouterr().err.splitlines()
    assert "cannot be written (the folder is another run's now), but the run goes on" in first
    lost = f"warning: 5 lines of {path} were never written"
    assert last == f"{lost}, and the file is gone with those before."


def test_events_that_cannot_be_written_stop_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def add_scalar(self, *_: Any) -> None:
            raise RuntimeError("its thread has ended")

        close = add_scalar

    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer._events = Broken()
    write_steps(writer, range(1, 4))
    assert capsys.readouterr().err.count("the run goes on without them") == 1
    writer._events = Broken()
    writer.close()
    assert capsys.readouterr().err.count("the run goes on without them") == 1
    (tmp_path / "a file").touch()
    writer = MetricsWriter(path, last_step=3)
    writer.moved(path, tmp_path / "a file" / "events")  # also where it is not installed
    write_steps(writer, range(4, 6))
    writer.close()
    assert capsys.readouterr().err.count("the run goes on without them") == 1
    assert steps(path) == [1, 2, 3, 4, 5]


def gone() -> TextIO:
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


def closed() -> TextIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS: dict[str, Callable[[], Any]] = {
    "a full disk": lambda: open("/dev/full", "w"),  # noqa: SIM115
    "a reader that has gone": gone,
    "closed": closed,
    "none": lambda: None,
    "ASCII": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
}


@pytest.fixture
def brief_run(
    world_of_one: None, brief_ends: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """``brief_run(name, *flags)``: the folder of a tiny run."""
    monkeypatch.setattr(
        "qsdp.train.after_training.matmul_flops_per_s", lambda device, precision: 1e9
    )

    def run(name: str, *flags: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "text.txt").write_text(TEXT)
        more = ("--steps", "3", "--save-every", "1", "--one-shot", "none", *flags)
        train.main(small_run(folder, *more))
        return folder / "out"

    return run


ODD_LINES = [
    {"step": 1},
    dict.fromkeys(STEP_METRICS, 1.0) | {"step": 1, "step_s": None},
    {key: {"a": 1.0} for key in (*STEP_METRICS, *WIRE_METRICS, "eval_bytes_sent")} | {"step": 1},
    dict.fromkeys(STEP_METRICS, 1e308) | {"step": 1},
    dict.fromkeys(STEP_METRICS, 10**300) | {"step": 10**30},
    dict.fromkeys(STEP_METRICS, 1) | {key: {} for key in (*WIRE_METRICS, "pruned")} | {"step": -7},
    dict.fromkeys(STEP_METRICS, 0) | {"step": 1, "wire_errors": 1.0, "val_loss": {"a": {}}},
]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_run_with_lines_of_others_among_its_own_comes_to_its_end(
    is_replaced: bool, brief_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(job: Any, **options: Any) -> Any:
        path, text = job.out / "metrics.jsonl", "".join(f"{json.dumps(o)}\n" for o in ODD_LINES)
        if job.steps_done == 1:
            path.unlink() if is_replaced else None
            path.write_text(text)
        return train_step(job, **options)

    monkeypatch.setattr("qsdp.train.loop.train_step", step)
    out = brief_run("run")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 3
    assert math.isfinite(summary["step_s_median"] + summary["wire"]["sent_bytes_per_step"])


@pytest.mark.parametrize("name", STREAMS)
def test_what_is_printed_may_be_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def show() -> None:
        for _ in range(2):
            print("\N{SNOWMAN}" * 10_000, flush=True)
            print("\N{SNOWMAN}", file=sys.stderr)
            Console().print("[red]\N{SNOWMAN}")
        with Progress() as progress:
            progress.advance(progress.add_task("\N{SNOWMAN}", total=1))

    assert ended_with(name, show, monkeypatch) == 0


@pytest.mark.parametrize("name", ["a full disk", "none"])
def test_a_run_whose_words_are_lost_comes_to_its_end(
    name: str, brief_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ended_with(name, lambda: brief_run("run") and None, monkeypatch) == 0
    assert (tmp_path / "run" / "out" / "summary.json").exists()


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.py")), ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["a full disk", "none"])
def test_a_command_whose_words_are_lost_has_its_status(
    name: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    for flag, expected in (("--help", 0), ("--bad", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "_exit", ended.append)
            patch.setattr(sys, "argv", [str(path), flag])
            patch.setattr(sys, "stdout", STREAMS[name]())
            patch.setattr(sys, "stderr", STREAMS[name]())
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(str(path), run_name="__main__")
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.close()  # as Python does, which would end with another status
        assert stop.value.code == expected
        assert ended in ([], [expected])
        ended.clear()


def ended_with(name: str, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a command that does ``work``."""
    ended: list[int] = []

    def command() -> None:
        with exit.one_sentence_at_the_end("nothing is lost"):
            work()

    with monkeypatch.context() as patch:
        patch.setattr(os, "_exit", ended.append)
        patch.setattr(sys, "stdout", STREAMS[name]())
        patch.setattr(sys, "stderr", STREAMS[name]())
        streams = sys.stdout, sys.stderr
        with pytest.raises(SystemExit):  # where ``os._exit`` does not end it
            exit.run(command)
        assert (sys.stdout, sys.stderr) == streams
        for stream in filter(None, streams):
            stream.close()  # what is left goes nowhere, without an error
    (status,) = ended
    return status


def test_what_cannot_be_encoded_is_printed_in_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    with forgiving_output():
        print("a \N{SNOWMAN} b", flush=True)
    assert written.getvalue() == b"a \\u2603 b\n"


def weights(out: Path) -> torch.Tensor:
    path = checkpoint.latest(out / "checkpoints")
    assert path is not None
    assert path.name == "step-00000003"
    checkpoint.verify(path)
    return checkpoint.TensorReader(path).read("blocks.1.mlp.down.weight")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_records_all_fail_comes_to_its_end(
    brief_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = weights(brief_run("sound"))
    out = tmp_path / "broken" / "out"
    is_broken = False

    def begin(*arguments: Any, **options: Any) -> Any:
        nonlocal is_broken
        is_broken = True
        return train_step(*arguments, **options)

    def is_refused(name: str) -> bool:
        return is_broken and not name.startswith("checkpoints")

    def draw(*_: object) -> None:
        raise LookupError("no font")

    with refusing(out, is_refused), monkeypatch.context() as patch:
        patch.setattr("qsdp.train.loop.train_step", begin)
        patch.setattr("qsdp.train.after_training.write_plots", draw)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            brief_run("broken", "--eval-every", "1", *events())
    said = capsys.readouterr()
    assert stop.value.code == 2
    *warnings, end = said.err.splitlines()
    assert end.startswith(f"error: the training is done, with its last checkpoint in {out}/check")
    assert end.endswith("and the same command writes it.")
    assert sum(line.startswith("warning: ") for line in warnings) == 3 + len(events())
    assert "no font" in said.err
    assert "3 lines of" in said.err
    assert "Validation loss" in said.out
    assert torch.equal(weights(out), expected)
    (out / "run.lock").unlink()  # it would bind nobody if this process had ended
    brief_run("broken", "--eval-every", "1", *events())
    assert json.loads((out / "summary.json").read_text())["steps"] == 3


def events() -> list[str]:
    return ["--tensorboard"] if importlib.util.find_spec("tensorboard") else []
