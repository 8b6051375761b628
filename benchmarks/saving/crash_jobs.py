"""Trainings that are to be disturbed: they are started, watched, struck and waited for."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.support.paths import ROOT, TRAIN

WRAPPED = "benchmarks.saving.crash_rank"
POLL_S = 0.001
_LEAST_S = 10.0
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Stopped(RuntimeError):
    """The benchmark is told to end."""


@dataclass
class Ended:
    """How a job came to its end."""

    status: int
    """The status of torchrun, or of the process that ran alone; -9 after SIGKILL."""
    ranks: list[int | None] = field(default_factory=list)
    """Exit statuses of torchrun's ranks in their last start; None of one that a signal ended."""
    printed: str = ""
    """What rank 0 printed on standard output."""
    complaints: list[str] = field(default_factory=list)
    """What each rank wrote on standard error."""
    has_hung: bool = False
    """Whether it, or a process of it, was still there when all patience had gone."""

    @property
    def told(self) -> str:
        """The statuses, for a reader."""
        if self.has_hung:
            return "hung"
        ranks = ", ".join("by a signal" if s is None else str(s) for s in self.ranks)
        return f"{self.status}" + (f" (ranks: {ranks})" if ranks else "")

    @property
    def said(self) -> list[str]:
        """The sentences on standard error, each once.

        Of warnings it is what they say, no line of code, and nothing of torch's log.
        """
        lines = [line for text in self.complaints for line in text.splitlines()]
        told = [line.rpartition("Warning: ")[2].strip() for line in lines if line[:1] not in " "]
        return [*dict.fromkeys(line for line in told if not re.match(r"\[?[WIE]\d{4} ", line))]


class Job:
    """One start of a command, by torchrun if there are several ranks.

    Its logs are in ``folder``.
    """

    def __init__(
        self,
        folder: Path,
        flags: Sequence[str],
        ranks: int,
        launcher: Sequence[str],
        patience_s: float,
    ) -> None:
        """Start the command. Whoever waits for it waits until ``patience_s`` have gone since."""
        folder.mkdir(parents=True)
        self._folder, self._ranks = folder, ranks
        command = [sys.executable, str(TRAIN)]
        if ranks > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *launcher]
            command += ["--nproc-per-node", str(ranks), "--redirects", "3"]
            command += ["--log-dir", str(folder / "ranks"), "-m", WRAPPED, str(folder)]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        inherited = {name: text for name, text in os.environ.items() if name not in _LAUNCHERS}
        self.started, self._deadline = time.time(), time.monotonic() + patience_s
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            self._process = subprocess.Popen(
                [*command, *flags],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=inherited | own,
                start_new_session=True,
            )
        self._seen: dict[int, str] = {}
        """Processes that it has started, by their number, and when: numbers are used again."""

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_until(self, is_time: Callable[[], bool], at_most_s: float = math.inf) -> bool:
        """Whether ``is_time`` came while the job ran, before all patience had gone."""
        deadline = min(self._deadline, time.monotonic() + at_most_s)
        while self.is_running and time.monotonic() < deadline:
            if is_time():
                return True
            time.sleep(POLL_S)
        return False

    def send(self, number: int, rank: int | None = None) -> bool:
        """Send a signal to a rank, as soon as it is there, or to torchrun.

        Torchrun is the process itself where that runs alone. False if the job has ended.
        """
        pid: int | None = self._process.pid
        if rank is not None and self._ranks > 1:
            self.wait_until(lambda: self._pid(rank) is not None)
            pid = self._pid(rank)
        self._look()
        with contextlib.suppress(ProcessLookupError):
            if pid is not None and self.is_running:
                os.kill(pid, number)
                return True
        return False

    def send_all(self, number: int) -> None:
        """Send a signal to the launcher and all that it has started."""
        self._look()
        with contextlib.suppress(ProcessLookupError):
            if self.is_running:
                os.kill(self._process.pid, number)
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> Ended:
        """Wait for its end, and kill what then is left."""
        has_hung = False
        self._look()
        try:
            self._process.wait(max(_LEAST_S, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            has_hung = True
        deadline = time.monotonic() + _LEAST_S  # ranks end after their launcher
        while not has_hung and self._left():
            has_hung = time.monotonic() > deadline
            time.sleep(POLL_S)
        self.kill()
        ranks = range(self._ranks) if self._ranks > 1 else ()
        printed = [self._read(rank, "stdout", "out") for rank in range(self._ranks)]
        return Ended(
            status=self._process.wait(),
            ranks=[self._status(rank) for rank in ranks],
            printed=printed[0],
            complaints=[self._read(rank, "stderr", "err") for rank in range(self._ranks)],
            has_hung=has_hung,
        )

    def kill(self) -> None:
        """Send SIGKILL to all of it that is there."""
        self.send_all(signal.SIGKILL)
        self.send_all(signal.SIGKILL)  # what was being started
        self._process.wait()

    def complaints(self) -> str:
        """What is on standard error so far."""
        return "".join(self._read(rank, "stderr", "err") for rank in range(self._ranks))

    def _pid(self, rank: int) -> int | None:
        for pid in _children(self._process.pid):
            with contextlib.suppress(OSError):
                if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(
                    b"\0"
                ):
                    return pid
        return None

    def _look(self) -> None:
        if self.is_running:
            self._seen |= {
                pid: began
                for pid in _descendants(self._process.pid)
                if (began := _began(pid)) is not None
            }

    def _left(self) -> list[int]:
        return [pid for pid, began in self._seen.items() if _began(pid) == began]

    def _status(self, rank: int) -> int | None:
        path = self._folder / f"status-{rank}"
        return int(path.read_text()) if path.exists() else None

    def _read(self, rank: int, stream: str, alone: str) -> str:
        paths = [self._folder / alone]
        if self._ranks > 1:
            paths = sorted(self._folder.glob(f"ranks/*/attempt_*/{rank}/{stream}.log"))
        return "".join(path.read_text(errors="replace") for path in paths)


class Stage:
    """Where the jobs of one part of the matrix run, side by side with others'.

    It ends with ``terminate``, which another thread may call: then nothing is started any more.
    """

    def __init__(self, folder: Path, flags: Sequence[str], ranks: int, patience_s: float) -> None:
        """Take ``flags``, those of every start, except --out."""
        self.folder, self.flags, self.ranks, self._patience_s = folder, [*flags], ranks, patience_s
        self._jobs: list[Job] = []
        self._count = itertools.count()
        self._is_stopped = False

    def start(self, out: Path, *more: str, launcher: Sequence[str] = ()) -> Job:
        """Start the command that trains into ``out``."""
        if self._is_stopped:
            raise Stopped("the benchmark was ended.")
        log = self.folder / f"start-{next(self._count)}"
        given = [*self.flags, *more, "--out", str(out)]
        job = Job(log, given, self.ranks, launcher, self._patience_s)
        self._jobs.append(job)
        return job

    def run(self, out: Path, *more: str) -> Ended:
        """Start it, and wait for its end."""
        return self.start(out, *more).wait()

    def terminate(self) -> None:
        """End all of it."""
        self._is_stopped = True
        for job in self._jobs:
            job.kill()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.terminate()


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (task / "children").read_text().split())


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _began(pid: int) -> str | None:
    """When a process that is there was started."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
