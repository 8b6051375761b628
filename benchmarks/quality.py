"""Validation loss of the quantized wire against stock FSDP2: same seeds, same data order.

Trains nano (the character-level recipe: 4 layers, width 128, context 64, 12 sequences a step over
all ranks, AdamW 1e-3 to 1e-4) once a wire and seed, one folder a run, and goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
WIRES = {
    "fp32": [],
    "w8g8": ["--qsdp-bits", "8"],
    "w4g8": ["--qsdp-weight-bits", "4", "--qsdp-grad-bits", "8"],
    "w8g4": ["--qsdp-weight-bits", "8", "--qsdp-grad-bits", "4"],
    "w4g4": ["--qsdp-bits", "4"],
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the final validation loss of several wires, mean over seeds."""

    data: Path
    """Text file, tinyshakespeare say: the first 90 % trains, the rest validates."""

    wires: tuple[str, ...] = ("fp32", "w8g8")
    """Which wires: fp32 (stock FSDP2), w8g8, w4g8, w8g4, w4g4."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, data order and rounding."""

    steps: int = 2000
    """Optimizer steps a run."""

    ranks: int = 2
    """Processes; 12 sequences a step are divided among them."""

    out: Path = Path("out/quality")
    """Folder of the runs and of quality.json."""


def main(options: Options) -> int:
    """Run what is missing, print the table, write quality.json. Returns the exit status."""
    unknown = set(options.wires) - set(WIRES)
    if unknown or not options.data.is_file() or 12 % options.ranks:
        what = f"wires {sorted(unknown)}" if unknown else f"{options.data}, {options.ranks} ranks"
        print(
            f"quality.py was given {what}; give an existing text file, ranks that divide 12 and "
            f"wires out of {', '.join(WIRES)}",
            file=sys.stderr,
        )
        return 2
    console = Console()
    # Seed by seed and wire by wire: a machine that changes its pace changes it for all alike.
    runs = [(wire, seed) for seed in options.seeds for wire in options.wires]
    losses: dict[str, dict[int, dict[str, object]]] = {wire: {} for wire in options.wires}
    for wire, seed in track(runs, "training", console=console):
        losses[wire][seed] = _run(options, wire, seed)

    table = Table(title=f"nano, {options.steps} steps, {options.ranks} ranks, {options.data.name}")
    for column in ("wire", "validation nats, by seed", "mean", "minus fp32", "wire bytes / fp32"):
        table.add_column(column, justify="left" if column == "wire" else "right")
    results = {}
    for wire, by_seed in losses.items():
        values = [float(str(summary["val_loss"])) for summary in by_seed.values()]
        gap = None
        if "fp32" in losses:
            base = [float(str(summary["val_loss"])) for summary in losses["fp32"].values()]
            gap = statistics.mean(values) - statistics.mean(base)
        counted = next(iter(by_seed.values()))["wire"]
        assert isinstance(counted, dict)
        ratio = counted["sent_bytes_per_step"] / counted["fp32_bytes_per_step"]
        results[wire] = {"val_loss": values, "minus_fp32": gap, "bytes_ratio": ratio}
        table.add_row(
            wire,
            " ".join(f"{value:.4f}" for value in values),
            f"{statistics.mean(values):.4f}",
            "" if gap is None else f"{gap:+.4f}",
            f"{ratio:.4f}",
        )
    console.print(table)
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}"
    console.print(f"measured on {where}; losses with exact weights")
    record = {"machine": where, "steps": options.steps, "ranks": options.ranks, "wires": results}
    (options.out / "quality.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _run(options: Options, wire: str, seed: int) -> dict[str, object]:
    out = options.out / f"{wire}-seed{seed}-steps{options.steps}-ranks{options.ranks}"
    summary = out / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(options.ranks), str(ROOT / "launch/train_gpt.py")]
        command += ["--model", "nano", "--data", str(options.data), "--tokenizer", "char"]
        command += ["--batch-size", str(12 // options.ranks), "--steps", str(options.steps)]
        command += ["--seed", str(seed), "--eval-every", "0", "--eval-batches", "1000000"]
        command += ["--save-every", "0", "--out", str(out), *WIRES[wire]]
        out.mkdir(parents=True, exist_ok=True)
        with (out / "log.txt").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{wire} with seed {seed} failed: see {out / 'log.txt'}")
    return dict(json.loads(summary.read_text()))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
