"""The rows of the crash matrix: what is done to a run, and what is promised then.

Each function disturbs runs of its stage's command, starts the same command again until it comes to
its end, and compares that with the undisturbed run ``whole``.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.saving.crash_folder import (
    HOWS,
    Row,
    Whole,
    damage,
    fill,
    is_told_of,
    judge_end,
    judge_start,
    judge_stopped,
    left_by_a_kill,
    lines_in,
    newest_step,
    num_lines,
    read_only,
    resize,
    small_disk,
    tree,
    written_since,
)
from benchmarks.saving.crash_jobs import Ended, Job, Stage
from qsdp import checkpoint
from qsdp.common.user_errors import quoted

Run = Callable[[Path], Ended]
"""Starts the command that trains into a folder, and waits for its end."""
ROOM_KIB = 64 << 10


@dataclass(frozen=True)
class Instant:
    """When a run is struck."""

    kind: str
    """What it waits for: ``writing`` of a checkpoint, ``step``, or ``start``."""
    count: int
    """Checkpoints begun, or lines written, since the start of the process."""
    delay_s: float

    @classmethod
    def draw(cls, rng: random.Random, save_every: int) -> Instant:
        """Draw one: half of them in the writing of a checkpoint, some before the first step."""
        (kind,) = rng.choices(("writing", "step", "start"), (5, 4, 1))
        count = rng.randint(1, 2) if kind == "writing" else rng.randint(1, 2 * save_every)
        return cls(kind, count, rng.uniform(0, {"writing": 0.04, "step": 0.1, "start": 4}[kind]))

    def wait(self, job: Job, out: Path) -> bool:
        """Whether it has come before the job's end."""
        # A run that goes on takes again what came after its checkpoint: this is beyond.
        target, begun = num_lines(out) + self.count, set[str]()

        def is_time() -> bool:
            if self.kind == "writing":
                begun.update(written_since(out, job.started))
                return len(begun) >= self.count
            return self.kind == "start" or num_lines(out) >= target

        if not job.wait_until(is_time):
            return False
        job.wait_until(lambda: False, self.delay_s)
        return job.is_running


class Life:
    """A run that is struck and started again until it has come to its end; then another one."""

    def __init__(self, stage: Stage, whole: Whole, launcher: Sequence[str] = ()) -> None:
        self.stage, self.whole, self._launcher = stage, whole, launcher
        self._number = 0

    @property
    def out(self) -> Path:
        return self.stage.folder / f"run-{self._number}"

    def strike(self, row: Row, instant: Instant, blow: Callable[[Job], bool]) -> Ended:
        """Start it, wait for the instant and strike; in another folder if it ended before."""
        for _ in range(10):
            before = newest_step(self.out)
            job = self.stage.start(self.out, launcher=self._launcher)
            if instant.wait(job, self.out) and blow(job):
                break
            end = job.wait()
            row.note(end)
            if row.faults or end.status:
                row.wrong.append("it ended before it was struck")
                return end
            judge_end(row, end, self.out, self.whole)
            row.ended = row.said = ""
            self._number += 1
        end = job.wait()
        row.note(end)
        writing = [path.name for path in (self.out / "checkpoints").glob("tmp-step-*")]
        row.when = f"after step {num_lines(self.out)}"
        if writing:
            row.when += f", writing {writing[0].removeprefix('tmp-').rpartition('-')[0]}"
        elif instant.kind == "start" or not num_lines(self.out):
            row.when += f", {instant.delay_s:.1f} s after the start"
        judge_stopped(row, self.out, self.whole, before)
        judge_start(row, end, before)
        return end

    def to_the_end(self, what: str) -> Row:
        """Run the same command once more, undisturbed."""
        row = Row(what, f"from step {newest_step(self.out)}")
        go_on(row, self.stage.run, self.out, self.whole)
        return row


def go_on(row: Row, run: Run, out: Path, whole: Whole) -> Ended:
    """Start the command again: it goes on from its newest checkpoint to the end of all."""
    before = newest_step(out)
    end = run(out)
    row.note(end)
    row.expect_status(end, 0)
    judge_start(row, end, before)
    judge_end(row, end, out, whole)
    return end


def kills(
    stage: Stage, whole: Whole, rng: random.Random, number: int, save_every: int
) -> list[Row]:
    """Send SIGKILL, to one rank or all processes at once, ``number`` times; then go to the end."""
    life, rows = Life(stage, whole), []
    for _ in range(number):
        rank = rng.choice([None, *range(stage.ranks)]) if stage.ranks > 1 else None
        everything = "the job" if stage.ranks > 1 else "the process"
        row = Row(f"SIGKILL of {everything if rank is None else f'rank {rank}'}")

        def blow(job: Job, rank: int | None = rank) -> bool:
            if rank is None:
                job.send_all(signal.SIGKILL)
                return True
            return job.send(signal.SIGKILL, rank)

        end = life.strike(row, Instant.draw(rng, save_every), blow)
        if not end.status:
            row.wrong.append("status 0, though it was killed")
        rows.append(row)
        if row.hangs or 2 in (end.status, *end.ranks):  # the others would be alike
            break
    return [*rows, life.to_the_end(f"goes on after {len(rows)} kills")]


def restarts(stage: Stage, whole: Whole, rng: random.Random, save_every: int) -> list[Row]:
    """Send SIGKILL to each rank in turn under torchrun --max-restarts: it goes on by itself."""
    out = stage.folder / "run"
    job = stage.start(out, launcher=["--max-restarts", str(stage.ranks)])
    row = Row("torchrun --max-restarts, each rank killed in turn")
    places = []
    for rank in range(stage.ranks):
        count = newest_step(out) + rng.randint(save_every, 2 * save_every)

        def is_time(count: int = count) -> bool:
            return num_lines(out) >= count

        if not (job.wait_until(is_time) and job.send(signal.SIGKILL, rank)):
            row.wrong.append(f"it ended before rank {rank} was killed")
            break
        places.append(f"rank {rank} after step {num_lines(out)}")
        last = newest_step(out)
        job.wait_until(lambda last=last: newest_step(out) > last)
    row.when = ", ".join(places)
    end = job.wait()
    row.note(end)
    row.expect_status(end, 0)
    judge_end(row, end, out, whole)
    return [row]


def signals(stage: Stage, whole: Whole, rng: random.Random, save_every: int) -> list[Row]:
    """Send SIGTERM and SIGUSR1, to one process and to all: steps are saved, and the status is 0."""
    launcher = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    life, rows = Life(stage, whole, launcher if stage.ranks > 1 else ()), []
    for name in ("SIGTERM", "SIGUSR1"):
        for rank in (None, rng.randrange(stage.ranks)) if stage.ranks > 1 else (None,):
            whom = f"rank {rank}" if rank is not None else "torchrun"
            row = Row(f"{name} to {whom if stage.ranks > 1 else 'the process'}")
            number = signal.Signals[name]

            def blow(job: Job, number: int = number, rank: int | None = rank) -> bool:
                return job.send(number, rank)

            count = rng.randint(1, 2 * save_every)
            end = life.strike(row, Instant("step", count, rng.uniform(0, 0.1)), blow)
            if any(end.ranks) or None in end.ranks:
                row.wrong.append(f"ranks ended with {end.ranks}, not 0")
            if bool(end.status) != (stage.ranks > 1 and rank is None):
                row.wrong.append(f"status {end.status}")
            done, saved = len(lines_in(life.out)), newest_step(life.out)
            if saved != done:
                row.wrong.append(f"{done} steps are done, and the newest checkpoint is of {saved}")
            if not re.search(f"{name}|(?i:signal)", "".join([end.printed, *end.complaints])):
                row.wrong.append("no line says why it ended")
            rows.append(row)
    return [*rows, life.to_the_end(f"goes on after {len(rows)} signals")]


def damaged(
    run: Run, out: Path, whole: Whole, rng: random.Random, step: int, name: str, how: str
) -> Row:
    """Damage a file of the newest checkpoint, of ``step``, before the command is started again.

    The checkpoint before is used, and a line says so.
    """
    left_by_a_kill(whole, out, step)
    where = damage(out / "checkpoints" / f"step-{step:08d}" / name, how, rng)
    row = Row(f"{name}: {how}", ", ".join(filter(None, (f"step {step}", where))))
    end = run(out)
    row.note(end)
    row.expect_status(end, 0)
    judge_start(row, end, step)
    if not end.status and not is_told_of(end, step):
        row.wrong.append("no line names the damaged checkpoint")
    judge_end(row, end, out, whole)
    return row


def damages(
    stage: Stage, whole: Whole, rng: random.Random, hows: Sequence[str] = HOWS
) -> list[Row]:
    """Damage each file of a checkpoint, in each way."""
    step = steps_kept(whole)[-2]
    names = sorted(p.name for p in (whole.out / "checkpoints" / f"step-{step:08d}").iterdir())
    return [
        damaged(stage.run, stage.folder / f"{how}-{name}", whole, rng, step, name, how)
        for how in hows
        for name in names
    ]


def all_damaged(run: Run, out: Path, whole: Whole, rng: random.Random) -> Row:
    """Leave no checkpoint to go on from: the command is refused, and nothing is removed."""
    step = steps_kept(whole)[-2]
    left_by_a_kill(whole, out, step)
    for path in checkpoint.steps(out / "checkpoints").values():
        damage(max(path.glob("*.distcp")), "a flipped byte", rng)
    row = Row("a flipped byte in every checkpoint", f"step {step}")
    return refused(row, run, out, out)


def unwritable(run: Run, out: Path, whole: Whole) -> Row:
    """Make the folder read-only: the command is refused; once it is not, it goes on."""
    step = steps_kept(whole)[-2]
    left_by_a_kill(whole, out, step)
    row = Row("a read-only folder", f"step {step}")
    with read_only(out):
        refused(row, run, out, out)
    go_on(row, run, out, whole)
    return row


def refused(row: Row, run: Run, out: Path, folder: Path) -> Row:
    """See that the command ends with status 2 and one sentence, and leaves ``folder`` as it was."""
    before = tree(folder)
    end = run(out)
    row.note(end)
    row.expect_status(end, 2)
    if tree(folder) != before:
        row.wrong.append(f"changed: {sorted({*tree(folder).items()} ^ {*before.items()})[0][0]}")
    return row


def two_jobs(stage: Stage, whole: Whole) -> list[Row]:
    """Start a second job in the folder of one that holds still, and two at once."""
    out = stage.folder / "held"
    row = Row("a second job on the folder of one that runs")
    first = stage.start(out)
    if first.wait_until(lambda: num_lines(out) >= 3):
        first.send_all(signal.SIGSTOP)
        row.when = f"after step {num_lines(out)}"
        refused(row, stage.run, out, out)
        first.send_all(signal.SIGCONT)
    end = first.wait()
    row.note(end)
    row.expect_status(end, 0)
    judge_end(row, end, out, whole)

    out = stage.folder / "at once"
    both = Row("two jobs on one folder, started at once")
    jobs = [stage.start(out), stage.start(out)]
    ends = sorted((job.wait() for job in jobs), key=lambda end: end.status)
    for end, status in zip(ends, (0, 2), strict=True):
        both.note(end)
        both.expect_status(end, status)
    both.said = " ".join(ends[1].said)
    judge_end(both, ends[0], out, whole)
    return [row, both]


def full_for_checkpoints(stage: Stage, whole: Whole) -> list[Row]:
    """Leave no room for the third checkpoint: status 2, those before it stay."""
    out = stage.folder / "checkpoints full"
    row = Row("a full disk for checkpoints")
    one = whole.out / "checkpoints" / f"step-{steps_kept(whole)[0]:08d}"
    size = sum(path.stat().st_size for path in one.iterdir())
    with small_disk(out / "checkpoints", 5 * size // 2 >> 10):
        end = stage.run(out)
        row.note(end)
        row.expect_status(end, 2)
        row.when = f"after step {num_lines(out)}"
        judge_stopped(row, out, whole, 0)
        found = checkpoint.steps(out / "checkpoints")
        if not found:
            (row.lost if num_lines(out) else row.wrong).append("no checkpoint is there")
        for path in found.values():
            try:
                checkpoint.verify(path)
            except ValueError as error:
                row.lost.append(quoted(error))
        resize(out / "checkpoints", ROOM_KIB)
        go_on(row, stage.run, out, whole)
    return [row]


@contextlib.contextmanager
def _apart(out: Path) -> Iterator[None]:
    """Inside, metrics and summary have a small disk, checkpoints and plots others with room."""
    with (
        small_disk(out, 512),
        small_disk(out / "checkpoints", ROOM_KIB),
        small_disk(out / "plots", ROOM_KIB),
    ):
        yield


def full_for_metrics(stage: Stage, whole: Whole, save_every: int) -> list[Row]:
    """Leave no room for lines of metrics, for a while.

    The run goes on, says so, and no line is lost without a word.
    """
    out = stage.folder / "metrics full"
    row = Row("a full disk for metrics, for a while")
    with _apart(out):
        job = stage.start(out)
        if job.wait_until(lambda: newest_step(out) >= save_every):
            ballast, full_at = fill(out), num_lines(out)
            job.wait_until(lambda: bool(job.complaints()))
            later = newest_step(out) + 3 * save_every
            job.wait_until(lambda: newest_step(out) >= later)
            row.when = f"from step {full_at} to {newest_step(out)}"
            ballast.unlink()
        end = job.wait()
        row.note(end)
        row.expect_status(end, 0)
        if "metrics" not in "".join(end.complaints):
            row.wrong.append("nothing about it on standard error")
        if end.status:
            go_on(row, stage.run, out, whole)
        else:
            judge_end(row, end, out, whole)
    return [row]


def full_for_plots(stage: Stage, whole: Whole) -> list[Row]:
    """Leave no room for plots: a line says so, and all else is there."""
    out = stage.folder / "plots full"
    row = Row("a full disk for plots", "at the end")
    with small_disk(out / "plots", 64):
        fill(out / "plots")
        end = stage.run(out)
        row.note(end)
        row.expect_status(end, 0)
        if "plot" not in "".join(end.complaints):
            row.wrong.append("nothing about it on standard error")
        judge_end(row, end, out, whole)
    return [row]


def full_for_summary(stage: Stage, whole: Whole) -> list[Row]:
    """Leave no room for summary.json: tables are printed, status 2; the command writes it later."""
    out = stage.folder / "summary full"
    row = Row("a full disk for the summary", "at the end")
    with _apart(out):
        job = stage.start(out)
        job.wait_until(lambda: num_lines(out) >= len(whole.lines))
        ballast = fill(out)
        end = job.wait()
        row.note(end)
        row.expect_status(end, 2)
        if "Validation loss" not in end.printed:
            row.wrong.append("no tables were printed")
        ballast.unlink()
        go_on(row, stage.run, out, whole)
    return [row]


def steps_kept(whole: Whole) -> list[int]:
    """The steps of the checkpoints of the undisturbed run."""
    return [*checkpoint.steps(whole.out / "checkpoints")]
