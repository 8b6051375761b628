"""Validation loss and bytes of the quantized wire against stock FSDP2: same seeds, same data order.

    python -m benchmarks.quality.quality --data tinyshakespeare.txt
    python -m benchmarks.quality.quality --data wikitext2.valid.txt --preset larger
    python -m benchmarks.quality.quality --data tinyshakespeare.txt --preset delta

Trains once a wire and seed, 12 sequences a step over all ranks. A wire's bytes are the mean over
all steps of its own training; those of the other way to gather are counted in a run of a few steps,
for there all steps are alike. With delta they are not: its first step sends all weights. Every run
leaves one small JSON file in --out, and the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from benchmarks.quality.quality_table import as_json, make_rows, make_table, plot, verdicts
from benchmarks.quality.quality_wires import COUNTED_APART, PRESETS, WIRES
from benchmarks.support import machine
from benchmarks.support.namespaces import exit_on_termination
from benchmarks.support.runs import (
    SEQUENCES,
    Mistake,
    Processes,
    Record,
    Run,
    launch,
    read_records,
    report_failures,
    run_all,
    write_json,
)
from qsdp.common.user_errors import quoted
from qsdp.data.corpus import load_corpus
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.model import GPT
from qsdp.models.registry import preset_defaults
from qsdp.train.run_flags import RunFlags

BYTES_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the final validation loss and the bytes of several wires."""

    data: Path
    """Text file: the first 90 % of its characters train, the rest validates."""

    preset: str = "nano"
    """nano, larger or delta: which model, wires and seeds.
    nano: all wires that send whole weights, three seeds. larger: the mini model, fp32 and the
    defaults, one seed. delta: the nano model, changed codes beside whole weights, three seeds.
    """

    wires: tuple[str, ...] | None = None
    """Which wires, if not the preset's.
    They are fp32, w4g4-default, w8g8-default, or weight and gradient bits (8/8, 6/6, 5/4, 4/4, 3/3)
    and method, as w5g4-dither: shift, dither, learned. Changed codes alone send w8g8-delta,
    w4g4-delta and w4g3-delta, the last also with -rotated or -learned behind it, of gradients.
    """

    seeds: tuple[int, ...] | None = None
    """Seeds of weights, data order and rounding, if not the preset's."""

    steps: int | None = None
    """Optimizer steps a run, if not the model's own."""

    ranks: int = 2
    """Processes of a training; 12 sequences a step are divided among them."""

    jobs: int = 1
    """Trainings side by side. Losses do not depend on it; seconds do."""

    gathers: tuple[str, ...] = COUNTED_APART
    """Count the bytes gathered twice and once, or one of them."""

    out: Path | None = None
    """Folder of the runs' records, quality.json and quality.png. Unset: out/quality/PRESET."""


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
        records = read_records(out, runs)
    except (Mistake, ValueError, OSError) as error:
        print(f"error: {quoted(error)}.", file=sys.stderr)
        return 2
    if failed := run_all(runs, records, out, options.jobs, console, train, result_of):
        report_failures(failed)
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
    console.print(
        "losses with exact weights; fp32's bytes with each value moved once; gathered delta: the "
        "mean of all steps of the training, its first included",
        highlight=False,
    )
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
        raise Mistake(f"--preset is {options.preset!r}: choose one of {', '.join(PRESETS)}.")
    preset = PRESETS[options.preset]
    wires = options.wires or preset.wires
    if unknown := set(wires) - WIRES.keys():
        raise Mistake(
            f"--wires holds {', '.join(sorted(unknown))}: choose among {', '.join(WIRES)}."
        )
    if wrong := set(options.gathers) - set(COUNTED_APART):
        raise Mistake(
            f"--gathers holds {', '.join(sorted(wrong))}: choose among {', '.join(COUNTED_APART)}."
        )
    if options.ranks < 2 or SEQUENCES % options.ranks:
        raise Mistake(f"--ranks is {options.ranks}: choose 2, 3, 4, 6 or 12.")
    if options.jobs < 1:
        raise Mistake(f"--jobs is {options.jobs}: choose 1 or more.")
    if not options.data.is_file():
        raise Mistake(f"--data {options.data} is no file: give a text.")
    steps = options.steps or preset_defaults()[preset.model].get("steps", RunFlags.steps)
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
    """Values in the model that is trained on ``data``."""
    vocab_size = load_corpus(data, "char").vocab_size
    with torch.device("meta"):
        built = GPT(GPTConfig.from_preset(model, vocab_size=vocab_size))
    return sum(parameter.numel() for parameter in built.parameters())


def result_of(record: Record) -> str:
    """A record in a few words."""
    is_training = record["kind"] == "training"
    return f"{record['val_loss']:.4f} nats" if is_training else "bytes counted"


def train(run: Run, processes: Processes) -> Record:
    """Take one run from start to end. Raises RuntimeError with the end of its log."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qsdp-quality-") as folder:
        summary = launch(run, Path(folder), processes)
    return run.settings | {
        "val_loss": summary["val_loss"],
        "val_loss_quantized": summary["val_loss_quantized"],
        "sent_bytes_per_step": summary["wire"]["sent_bytes_per_step"],
        "fp32_bytes_per_step": summary["wire"]["fp32_bytes_per_step"],
        "step_s_median": summary["step_s_median"],
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine.describe(),
    }


if __name__ == "__main__":
    exit_on_termination()
    sys.exit(
        main(tyro.cli(Options, prog="python -m benchmarks.quality.quality", description=__doc__))
    )
