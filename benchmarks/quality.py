"""Validation loss and bytes of the quantized wire against stock FSDP2: same seeds, same data order.

    python benchmarks/quality.py --data tinyshakespeare.txt
    python benchmarks/quality.py --data wikitext2.valid.txt --preset larger

Trains once a wire and seed, 12 sequences a step over all ranks. A wire's bytes are counted in its
own training; those of the other way to gather in a run of a few steps. Every run leaves one small
JSON file in --out, and the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import machine
import torch
import tyro
from namespaces import exit_on_termination
from quality_table import Record, as_json, make_rows, make_table, plot, verdicts
from quality_wires import GATHERS, PRESETS, WIRES
from rich.console import Console

from qsdp.data import load_corpus
from qsdp.models import GPT, GPTConfig
from qsdp.train.config import RECIPES, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
SEQUENCES = 12  # a step, over all ranks
BYTES_STEPS = 3


class Mistake(Exception):
    """Options that cannot be run, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the final validation loss and the bytes of several wires."""

    data: Path
    """Text file: the first 90 % of its characters train, the rest validates."""

    preset: str = "nano"
    """`nano`: all wires, three seeds. `larger`: the mini model, fp32 and the defaults, one seed."""

    wires: tuple[str, ...] | None = None
    """Which wires, if not the preset's: fp32, w4g4-default, w8g8-default, or weight and gradient
    bits (8/8, 6/6, 5/4, 4/4, 3/3) and method, as w5g4-dither: shift, dither, learned."""

    seeds: tuple[int, ...] | None = None
    """Seeds of weights, data order and rounding, if not the preset's."""

    steps: int | None = None
    """Optimizer steps a run, if not the model's own."""

    ranks: int = 2
    """Processes of a training; 12 sequences a step are divided among them."""

    jobs: int = 1
    """Trainings side by side. Losses do not depend on it; seconds do."""

    gathers: tuple[str, ...] = GATHERS
    """Count the bytes gathered `twice` and `once`, or one of them."""

    out: Path | None = None
    """Folder of the runs' records, quality.json and quality.png; out/quality/PRESET unless
    given."""


@dataclass(frozen=True)
class Run:
    """One call of launch/train_gpt.py, and the settings that its record must have."""

    name: str
    settings: Record
    flags: list[str]

    @property
    def is_training(self) -> bool:
        return self.settings["kind"] == "training"


def main(options: Options) -> int:
    """Run what is missing, print the table, write quality.json and the plot.

    Returns the exit status: 0, 1 if a run failed, 2 for options that cannot be run.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log is no reason to break lines
    try:
        runs = plan(options)
        out = options.out or Path("out/quality", options.preset)
        out.mkdir(parents=True, exist_ok=True)
        records = {run.name: record for run in runs if (record := read_record(out, run))}
    except (Mistake, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = train_all(runs, records, out, options.jobs, console)
    if failed:
        for name, log in failed.items():
            print(f"{log}\nerror: {name} failed, see above", file=sys.stderr)
        return 1

    done = [records[run.name] for run in runs]
    trainings = [record for record in done if record["kind"] == "training"]
    rows = make_rows(trainings, [record for record in done if record["kind"] == "bytes"])
    first = trainings[0]
    title = f"{first['model']}, {first['steps']} steps, {first['ranks']} ranks, {first['data']}"
    console.print(make_table(rows, title))
    found = verdicts(rows)
    for verdict in found:
        console.print(
            f"{verdict['what']}: {verdict['measured']:.4f}, at most {verdict['at_most']}: "
            f"{'met' if verdict['is_met'] else 'MISSED'}",
            highlight=False,
        )
    console.print("losses with exact weights; fp32's bytes with each value moved once")
    described = machine.describe()
    console.print(machine.one_line(described), highlight=False)
    result = {"title": title, "machine": described, "wires": as_json(rows), "targets": found}
    write_json(out / "quality.json", result)
    if not plot(rows, out / "quality.png", f"Loss against bytes: {title}"):
        console.print("no plot: it needs matplotlib, and fp32 among the wires")
    return 0


def plan(options: Options) -> list[Run]:
    """All runs, trainings first. Raises Mistake for options that cannot be run."""
    if options.preset not in PRESETS:
        raise Mistake(f"--preset is {options.preset!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[options.preset]
    wires = options.wires or preset.wires
    if unknown := set(wires) - WIRES.keys():
        raise Mistake(f"--wires holds {', '.join(sorted(unknown))}; choose of {', '.join(WIRES)}")
    if wrong := set(options.gathers) - set(GATHERS):
        raise Mistake(f"--gathers holds {', '.join(sorted(wrong))}; choose of {', '.join(GATHERS)}")
    if options.ranks < 2 or SEQUENCES % options.ranks:
        raise Mistake(f"--ranks is {options.ranks}; choose 2, 3, 4, 6 or 12")
    if options.jobs < 1:
        raise Mistake(f"--jobs is {options.jobs}; choose 1 or more")
    if not options.data.is_file():
        raise Mistake(f"--data {options.data} is no file; give a text")
    steps = options.steps or RECIPES[preset.model].get("steps", TrainConfig.steps)
    common = {
        "model": preset.model,
        "ranks": options.ranks,
        "data": options.data.name,
        "data_sha256": hashlib.sha256(options.data.read_bytes()).hexdigest(),
        "parameters": count_parameters(preset.model, options.data),
    }
    flags = ["--model", preset.model, "--data", str(options.data), "--tokenizer", "char"]
    flags += ["--batch-size", str(SEQUENCES // options.ranks), "--eval-every", "0"]
    flags += ["--save-every", "0", "--resume", "none"]
    runs = []
    # Seed by seed and wire by wire: a machine that changes its pace changes it for all alike.
    for seed in options.seeds or preset.seeds:
        for name in wires:
            gather = WIRES[name].gather
            own = {"kind": "training", "wire": name, "gather": gather, "seed": seed, "steps": steps}
            chosen = WIRES[name].all_flags(gather)
            more = ["--seed", str(seed), "--steps", str(steps), "--eval-batches", "1000000"]
            settings = own | common | {"flags": chosen}
            runs.append(Run(f"{name}-seed{seed}", settings, [*flags, *more, *chosen]))
    for name in wires:
        for gather in WIRES[name].gathers:
            if gather == WIRES[name].gather or gather not in options.gathers:
                continue
            own = {"kind": "bytes", "wire": name, "gather": gather, "seed": 0, "steps": BYTES_STEPS}
            chosen = WIRES[name].all_flags(gather)
            more = ["--steps", str(BYTES_STEPS), "--eval-batches", "1"]
            settings = own | common | {"flags": chosen}
            runs.append(Run(f"{name}-bytes-{gather}", settings, [*flags, *more, *chosen]))
    return runs


def count_parameters(model: str, data: Path) -> int:
    """Values in the model that is trained on `data`."""
    vocab_size = load_corpus(data, "char").vocab_size
    with torch.device("meta"):
        built = GPT(GPTConfig.from_preset(model, vocab_size=vocab_size))
    return sum(parameter.numel() for parameter in built.parameters())


def read_record(out: Path, run: Run) -> Record | None:
    """The record that an earlier call left. Raises Mistake if it is of another run."""
    path = out / f"{run.name}.json"
    if not path.exists():
        return None
    record: Record = json.loads(path.read_text())
    for name, value in run.settings.items():
        if record.get(name) != value:
            raise Mistake(
                f"{path} has {name} {record.get(name)}, not {value}; give another --out, or remove "
                "that file"
            )
    return record


def train_all(
    runs: list[Run], records: dict[str, Record], out: Path, jobs: int, console: Console
) -> dict[str, str]:
    """Run what `records` lacks and add it there. Returns the last lines of what failed."""
    missing = [run for run in runs if run.name not in records]
    failed: dict[str, str] = {}
    waiting = {run.name: run for run in missing}
    started = time.monotonic()
    console.print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before")
    with ThreadPoolExecutor(jobs) as pool, trainings_end_with_us() as processes:
        futures = {pool.submit(train, run, processes): run for run in missing}
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
                told = f"{record['val_loss']:.4f} nats" if run.is_training else "bytes counted"
                left = seconds_left([*waiting.values()], [*records.values()]) / jobs
                console.print(
                    f"[{len(runs) - len(waiting):3}/{len(runs)}] {run.name}: {told} in "
                    f"{record['seconds']:.0f} s; {_clock(time.monotonic() - started)} gone, about "
                    f"{_clock(left)} left",
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


def train(run: Run, processes: set[subprocess.Popen[str]]) -> Record:
    """Take one run from start to end. Raises RuntimeError with the end of its log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(run.settings["ranks"]), str(ROOT / "launch/train_gpt.py")]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qsdp-quality-") as folder:
        job = subprocess.Popen(
            [*command, "--out", folder, *run.flags],
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
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return run.settings | {
        "val_loss": summary["val_loss"],
        "val_loss_quantized": summary["val_loss_quantized"],
        "sent_bytes_per_step": summary["wire"]["sent_bytes_per_step"],
        "fp32_bytes_per_step": summary["wire"]["fp32_bytes_per_step"],
        "step_s_median": summary["step_s_median"],
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine.describe(),
    }


@contextmanager
def trainings_end_with_us() -> Iterator[set[subprocess.Popen[str]]]:
    """A set of processes, those of which that still run when the block is left are told to end."""
    processes: set[subprocess.Popen[str]] = set()
    try:
        yield processes
    finally:
        for process in [*processes]:
            process.terminate()


def write_json(path: Path, value: Any) -> None:
    """Write all of a file or nothing: an interrupted call must leave no half of one."""
    replacement = path.with_name(path.name + ".tmp")
    replacement.write_text(json.dumps(value, indent=1) + "\n")
    replacement.replace(path)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    exit_on_termination()
    sys.exit(main(tyro.cli(Options, description=__doc__)))
