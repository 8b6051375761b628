"""Many calls of launch/train_gpt.py, each with a JSON record; what has one is not done again."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.support.namespaces import Unavailable
from benchmarks.support.paths import TRAIN
from qsdp.common.json_files import write_json
from qsdp.common.user_errors import quoted

Record = dict[str, Any]
Processes = set[subprocess.Popen[str]]
SEQUENCES = 12  # a step, over all ranks


class Mistake(Exception):
    """Options that cannot be run, in one sentence."""


@contextmanager
def ends_on_error() -> Iterator[None]:
    """Inside, an error in one sentence ends the program.

    It ends with status 2 where something cannot be run, as asked or on this machine, and with 1
    where it failed.
    """
    try:
        yield
    except (Mistake, RuntimeError, ValueError) as error:
        print(f"error: {quoted(error)}.", file=sys.stderr)
        sys.exit(2 if isinstance(error, Mistake | Unavailable) else 1)


@dataclass(frozen=True)
class Run:
    """One call of launch/train_gpt.py, and the settings that its record must have."""

    name: str
    settings: Record
    flags: list[str]

    @property
    def is_training(self) -> bool:
        return self.settings["kind"] == "training"


def read_record(out: Path, run: Run) -> Record | None:
    """The record that an earlier call left. Raises Mistake if it is of another run."""
    path = out / f"{run.name}.json"
    if not path.exists():
        return None
    record: Record = json.loads(path.read_text())
    for name, value in run.settings.items():
        if record.get(name) != value:
            raise Mistake(
                f"{path} has {name} {record.get(name)}, not {value}: give another --out, or remove "
                "that file."
            )
    return record


def read_records(out: Path, runs: list[Run]) -> dict[str, Record]:
    """What earlier calls left of ``runs`` in the folder ``out``, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    return {run.name: record for run in runs if (record := read_record(out, run))}


def run_all(
    runs: list[Run],
    records: dict[str, Record],
    out: Path,
    jobs: int,
    console: Console,
    take: Callable[[Run, Processes], Record],
    result_of: Callable[[Record], str],
) -> dict[str, str]:
    """Run what ``records`` lacks and add it there, ``jobs`` side by side.

    Args:
        take: Takes one run from start to end; raises RuntimeError with the end of its log.
        result_of: A record in a few words.

    Returns:
        The last lines of what failed, by name.
    """
    missing = [run for run in runs if run.name not in records]
    failed: dict[str, str] = {}
    waiting = {run.name: run for run in missing}
    started = time.monotonic()
    console.print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before")
    with ThreadPoolExecutor(jobs) as pool, trainings_end_with_us() as processes:
        futures = {pool.submit(take, run, processes): run for run in missing}
        try:
            for future in as_completed(futures):
                run = futures[future]
                del waiting[run.name]
                try:
                    records[run.name] = record = future.result()
                except RuntimeError as error:
                    failed[run.name] = str(error)
                    console.print(f"{run.name} failed", highlight=False)
                    continue
                write_json(out / f"{run.name}.json", record)
                left = seconds_left([*waiting.values()], [*records.values()]) / jobs
                console.print(
                    f"[{len(runs) - len(waiting):3}/{len(runs)}] {run.name}: {result_of(record)} "
                    f"in {record['seconds']:.0f} s; {_clock(time.monotonic() - started)} gone, "
                    f"about {_clock(left)} left",
                    highlight=False,
                    markup=False,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def seconds_left(waiting: list[Run], records: list[Record]) -> float:
    """What the runs still to come will take one after the other, by the mean of their kind."""
    total = 0.0
    for run in waiting:
        alike = [r["seconds"] for r in records if r["kind"] == run.settings["kind"]]
        total += statistics.mean(alike or [r["seconds"] for r in records])
    return total


def launch(run: Run, out: Path, processes: Processes) -> Record:
    """Train into the folder ``out``, on one thread a rank, and return summary.json.

    Raises RuntimeError with the end of the log.
    """
    command = [sys.executable]
    if run.settings["ranks"] > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(run.settings["ranks"])]
    job = subprocess.Popen(
        [*command, str(TRAIN), "--out", str(out), *run.flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    processes.add(job)
    log, _ = job.communicate()
    processes.discard(job)
    if job.returncode:
        raise RuntimeError(log[-4000:])
    summary: Record = json.loads((out / "summary.json").read_text())
    return summary


@contextmanager
def trainings_end_with_us() -> Iterator[Processes]:
    """A set of processes, those of which that still run when the block is left are told to end."""
    processes: Processes = set()
    try:
        yield processes
    finally:
        for process in [*processes]:
            process.terminate()


def report_failures(failed: dict[str, str]) -> None:
    """Print the ends of the logs of what failed."""
    for name, log in failed.items():
        print(f"{log}\nerror: {name} failed: see above.", file=sys.stderr)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
