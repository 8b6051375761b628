"""How long it takes to begin: importing qsdp beyond torch and FSDP2, and the job's first step.

    python -m benchmarks.cost.startup --json startup.json

Imports are timed in fresh processes, in turns; the difference is the median over rounds. The job
is launch/train_gpt.py on two ranks as "make train" starts it; its first step is over when its
metrics have a line, counted from the start of torchrun.

Exits with status 1 if an import takes more than 0.3 s or the first step comes after 12 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.support import machine
from benchmarks.support.asked import check_least
from benchmarks.support.paths import TRAIN
from benchmarks.support.runs import ends_on_error
from qsdp.common.json_files import write_json

IMPORT_AT_MOST_S, STEP_AT_MOST_S = 0.3, 12.0
PATIENCE_S = 120.0
FSDP = "from torch.distributed.fsdp import fully_shard"


def main() -> None:
    arguments = parse()
    with ends_on_error():
        check_least(arguments, {"rounds": 1, "jobs": 1})
        rows = measure(arguments)
    for each in rows:
        verdict = "met" if each["is_met"] else "MISSED"
        spread = f"{min(each['seconds']):.2f} to {max(each['seconds']):.2f}"
        print(f"{each['what']:42}{each['median_s']:7.2f} s ({spread}), ", end="")
        print(f"at most {each['at_most_s']:g}: {verdict}")
    described = machine.describe()
    print(machine.one_line(described))
    if arguments.json is not None:
        write_json(arguments.json, {"machine": described, "rows": rows})
    sys.exit(0 if all(each["is_met"] for each in rows) else 1)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the table."""
    alone, installed = (
        [seconds_of(more) - seconds_of(less) for _ in range(arguments.rounds)]
        for less, more in (
            ("import torch", "import torch, qsdp"),
            (FSDP, f"{FSDP}; import qsdp; qsdp.install, qsdp.QSDPConfig"),
        )
    )
    steps = [first_step() for _ in range(arguments.jobs)]
    return [
        row("import qsdp, beyond torch", alone, IMPORT_AT_MOST_S),
        row("qsdp.install, beyond torch and FSDP2", installed, IMPORT_AT_MOST_S),
        row("the end of the job's first step, 2 ranks", steps, STEP_AT_MOST_S),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="pairs of imports")
    parser.add_argument("--jobs", type=int, default=5, help="how often the job is started")
    parser.add_argument("--json", type=Path, help="a file for the table")
    return parser.parse_args()


def row(what: str, seconds: list[float], at_most: float) -> dict[str, Any]:
    """A line of the table."""
    median = statistics.median(seconds)
    return {
        "what": what,
        "seconds": seconds,
        "median_s": median,
        "at_most_s": at_most,
        "is_met": median <= at_most,
    }


def seconds_of(program: str) -> float:
    """How long a fresh Python runs."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], check=False)
    if done.returncode:
        raise RuntimeError(f"{program!r} ended with status {done.returncode}.")
    return time.perf_counter() - started


def first_step() -> float:
    """How long the job takes to its first line of metrics."""
    with tempfile.TemporaryDirectory(prefix="qsdp-startup-") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", str(TRAIN), "--model", "nano", "--data", "stdlib"]
        command += ["--steps", "2", "--eval-batches", "1", "--qsdp-bits", "8", "--cram"]
        command += ["--out", folder]
        metrics = Path(folder) / "metrics.jsonl"
        started = time.perf_counter()
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if job.poll() is not None:
                    raise RuntimeError(f"{TRAIN.name} ended with status {job.returncode}.")
                if time.perf_counter() - started > PATIENCE_S:
                    raise RuntimeError(f"{TRAIN.name} took no step in {PATIENCE_S:g} s.")
                time.sleep(0.01)
            return time.perf_counter() - started
        finally:
            job.terminate()  # killed, torchrun would leave its ranks behind
            job.wait()


if __name__ == "__main__":
    main()
