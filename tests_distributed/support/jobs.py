"""The trainer's commands on the ranks of a pool, as under a launcher but without starting one.

A rank calls the command's own ``main``. What a launcher gives is put in its place: the environment,
a store to meet through, files for what is printed. A pool of its own ends with each call, as ranks
do.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from qsdp.commands import evaluate, exit
from qsdp.commands.train import main
from qsdp.report.metrics import MetricsWriter
from qsdp.train import after_training, loop, validate, world
from tests.support import patience
from tests_distributed.support.leftovers import held
from tests_distributed.support.pool import Pool, RankError, meets_by_itself

Flags = Sequence[str]
"""Of launch/train_gpt.py; after the word ``evaluate``, of launch/evaluate.py."""

_POLL_S = 0.002


@dataclass(frozen=True)
class End:
    """How a command ended on one rank."""

    status: object
    printed: str
    complaint: str
    """What was written to standard error."""


@dataclass(frozen=True)
class _Work:
    """What the ranks are to do; see ``Jobs``."""

    folder: Path
    commands: list[list[list[str]]]
    """By command and rank, the flags."""
    nodes: tuple[int, ...]
    homes: tuple[Path, ...] = ()
    in_full: bool = False
    last_step: int | None = None
    disk_s: float = 0.0
    told: int | None = None


class Jobs:
    """Runs commands; of the ``run_jobs`` fixture."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is an empty one for stores and what is printed."""
        self._folder = folder
        self._count = itertools.count()
        self.max_threads = 0
        """The most that a rank had after its commands."""

    def ends(
        self,
        nodes: Sequence[int],
        *commands: Flags | list[Flags],
        homes: Sequence[Path] = (),
        in_full: bool = False,
        told: int | None = None,
    ) -> list[list[End]]:
        """Run commands one after the other and return, for each, how it ended on every rank.

        Args:
            nodes: How many ranks each node has, as their launchers would say. A single rank runs
                without a launcher.
            commands: The flags; a list of lists holds those of each rank.
            homes: By rank, the folder that it works in.
            in_full: With what takes longest at the end of a run: plots, a long sample, the rate of
                matrix products.
            told: The rank that gets SIGUSR1 in the first step of each command.
        """
        folder = self._new_folder()
        work = _Work(
            folder,
            _by_rank(commands, sum(nodes)),
            tuple(nodes),
            tuple(homes),
            in_full,
            told=told,
        )
        pool = Pool(sum(nodes), folder)
        try:
            results = _call(pool, work)
        finally:
            self.max_threads = max(self.max_threads, pool.max_threads)
            pool.kill()
        return [
            [_end(folder, number, rank, statuses[number]) for rank, statuses in enumerate(results)]
            for number in range(len(commands))
        ]

    def succeed(
        self,
        nodes: Sequence[int],
        *commands: Flags,
        in_full: bool = False,
        told: int | None = None,
    ) -> str:
        """Run commands that end well on every rank, and return what rank 0 printed."""
        ends = self.ends(nodes, *commands, in_full=in_full, told=told)
        for end in itertools.chain(*ends):
            assert end.status == 0, end.complaint
        assert all(not end.printed for _, *others in ends for end in others)
        return "".join(end.printed for end, *_ in ends)

    def killed(
        self,
        nodes: Sequence[int],
        flags: Flags,
        is_time: Callable[[], bool],
        *,
        last_step: int | None = None,
        disk_s: float = 0.0,
    ) -> str:
        """Begin a command, SIGKILL its ranks when ``is_time``, and return what rank 0 had printed.

        For a slow look-out: after ``last_step``, if given, rank 0 waits to be killed, and whatever
        is synced to disk takes ``disk_s`` seconds longer.

        Raises AssertionError if the command came to its end, or not to that time.
        """
        folder = self._new_folder()
        pool = Pool(sum(nodes), folder)
        work = _Work(
            folder,
            _by_rank([flags], sum(nodes)),
            tuple(nodes),
            last_step=last_step,
            disk_s=disk_s,
        )
        failures: list[RankError] = []

        def call() -> None:
            try:
                _call(pool, work)
            except RankError as error:
                failures.append(error)

        job = threading.Thread(target=call)
        job.start()
        try:
            while not (is_killed := is_time()) and job.is_alive():
                time.sleep(_POLL_S)
        finally:
            pool.strike()
            job.join()
            pool.kill()
        printed = (folder / "printed-0-0").read_text()
        assert is_killed, (printed, failures)
        assert failures, printed
        assert "Traceback" not in str(failures[0])
        return printed

    def _new_folder(self) -> Path:
        folder = self._folder / f"jobs-{next(self._count)}"
        folder.mkdir()
        return folder


def _call(pool: Pool, work: _Work) -> list[list[object]]:
    """By rank, the exit status of each command."""
    return pool.call(pickle.dumps((_run, (work,))), patience.seconds())


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in a folder of results."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _by_rank(commands: Sequence[Any], size: int) -> list[list[list[str]]]:
    return [
        [list(flags) for flags in command] if isinstance(command[0], list) else [[*command]] * size
        for command in commands
    ]


def _end(folder: Path, number: int, rank: int, status: object) -> End:
    printed, complaint = (
        (folder / f"{kind}-{number}-{rank}").read_text() for kind in ("printed", "complaint")
    )
    return End(status, printed, complaint)


@meets_by_itself
def _run(store: str, rank: int, size: int, work: _Work) -> list[object]:
    """The exit status of each command on this rank."""
    shared = dist.FileStore(store, size)
    statuses = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        for name in _environment(0, (1, 1)):
            os.environ.pop(name, None)
        os.environ.update(_environment(rank, work.nodes))
        # No launcher ends this rank when rank 0 has spoken.
        stack.enter_context(mock.patch.object(exit, "_PATIENCE_S", 0.0))
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        if work.homes:
            stack.enter_context(contextlib.chdir(work.homes[rank]))
        if not work.in_full:
            stack.enter_context(_short_end())
        if work.last_step is not None:
            stack.enter_context(_waiting_after(work.last_step))
        stack.enter_context(_syncing_late(work.disk_s))
        if work.told == rank:
            stack.enter_context(_told())
        for number, flags in enumerate(work.commands):
            # Where no command has met before, as under a launcher of its own.
            meeting = (dist.PrefixStore(f"command-{number}", shared), rank, size)
            with (
                mock.patch.object(world, "rendezvous", lambda *_, m=meeting, **__: iter([m])),
                (work.folder / f"printed-{number}-{rank}").open("w") as printed,
                (work.folder / f"complaint-{number}-{rank}").open("w") as complaint,
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(complaint),
            ):
                statuses.append(_status(flags[rank]))
            _check_nothing_is_open()
    return statuses


def _status(flags: list[str]) -> object:
    try:
        if flags[:1] == ["evaluate"]:
            evaluate.main(flags[1:])
        else:
            main(flags)
    except SystemExit as stop:
        return stop.code
    return 0


def _check_nothing_is_open() -> None:
    """Raise AssertionError for what ``main`` should have closed; the process goes on without it."""
    assert not dist.is_initialized()
    assert threading.enumerate() == [threading.main_thread()]
    assert not [file for file in held().files if re.search(r"metrics\.jsonl|tfevents", file)]


def _environment(rank: int, nodes: tuple[int, ...]) -> dict[str, str]:
    """What torchrun sets for this rank, for all that a program may read."""
    size = sum(nodes)
    if size == 1:
        return {}
    firsts = list(itertools.accumulate(nodes, initial=0))
    node = max(node for node in range(len(nodes)) if firsts[node] <= rank)
    values = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank - firsts[node],
        "LOCAL_WORLD_SIZE": nodes[node],
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": len(nodes),
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": size,
    }
    return {name: str(value) for name, value in values.items()}


@contextlib.contextmanager
def _short_end() -> Iterator[None]:
    """Inside, the end of a run does without what takes longer than all steps of a small one."""
    with (
        mock.patch.object(validate, "_SAMPLE_TOKENS", 2),
        mock.patch.object(after_training, "matmul_flops_per_s", return_value=1e10),
        mock.patch.object(after_training, "write_plots", return_value=[]),
    ):
        yield


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Inside, SIGUSR1 comes in the first step of each command."""
    forward_backward = loop.run_micro_batches

    def interrupted(job: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return forward_backward(job)

    with mock.patch.object(loop, "run_micro_batches", interrupted):
        yield


@contextlib.contextmanager
def _waiting_after(last_step: int) -> Iterator[None]:
    """Inside, the rank that logs the metrics of ``last_step`` goes no further."""
    log = MetricsWriter.log

    def log_and_wait(writer: MetricsWriter, line: dict[str, Any]) -> None:
        log(writer, line)
        if line["step"] == last_step:
            time.sleep(patience.seconds())

    with mock.patch.object(MetricsWriter, "log", log_and_wait):
        yield


@contextlib.contextmanager
def _syncing_late(disk_s: float) -> Iterator[None]:
    """Inside, the disk is slow."""
    fsync = os.fsync

    def sync_late(file: Any) -> None:
        time.sleep(disk_s)
        fsync(file)

    with mock.patch.object(os, "fsync", sync_late):
        yield
