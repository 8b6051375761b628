"""Cost of a step against ranks, parameters and groups, and memory beside plain FSDP2's.

    python -m benchmarks.cost.scaling --out out/scaling
    python -m benchmarks.cost.scaling --short

Everything runs in processes of this machine over loopback, without a slow link: what is seen is the
processor's work, of which every rank has less the more ranks share the cores. FSDP2 and qsdp take
turns in one job (see contestants.py), and the ratio is the median over rounds, with its spread.

Memory is the largest resident set of rank 0 (on GPUs: the most that torch has allocated) in a job
of one contestant, less that of the same job before any model was made. Killed, the same command
goes on with what --out lacks.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.support import machine
from benchmarks.support.asked import check_each_least, check_shared, claimed
from benchmarks.support.contestants import add_turn_arguments
from benchmarks.support.race import LOOPBACK, device_of, take_turns
from benchmarks.support.runs import Mistake, ends_on_error
from benchmarks.support.steps import MODELS
from qsdp.common.json_files import write_json
from qsdp.report.plots import save_png

THEIRS, OURS = "fsdp-fp32", "qsdp-w8g8-once-fp32"
OTHER = "qsdp-w4g4-once-fp32"
LABELS = {OURS: "W8G8", OTHER: "W4G4"}
AXES = {"ranks": "ranks", "parameters": "parameters", "groups": "groups of blocks"}


def main() -> None:
    arguments = parse()
    rows = []
    with ends_on_error():
        check_shared(arguments)
        check_each_least("--ranks", arguments.ranks, 1)
        check_each_least("--groups-of", arguments.groups_of, 1)
        if not points(arguments):
            raise Mistake("there is nothing to measure: give --ranks, --models or --groups-of.")
        most = argparse.Namespace(**vars(arguments) | {"hosts": max([2, *arguments.ranks])})
        arguments.device = device_of(most)
        settings = {name: getattr(arguments, name) for name in ("tokens", "context", "rounds")}
        with claimed(arguments.out):
            print(in_words(settings))
            for axis, value, changes in points(arguments):
                rows.append({"axis": axis} | point(arguments, f"{axis}-{value}", changes))
                print(line(rows[-1]), flush=True)
            described = machine.describe(arguments.device)
            record = {"machine": described, "link": LOOPBACK, "settings": settings, "rows": rows}
            write_json(arguments.out / "scaling.json", record)
            print(machine.one_line(described))
    if not plot(rows, arguments.out / "scaling.png"):
        print("no plot: it needs matplotlib")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8], help="with 5m")
    parser.add_argument(
        "--models", nargs="*", choices=MODELS, default=["1m", "5m", "19m", "50m", "116m"]
    )
    parser.add_argument(
        "--groups-of", type=int, nargs="*", default=[1, 3, 6, 12], help="groups of blocks, 116m"
    )
    parser.add_argument("--short", action="store_true", help="a few points, in some minutes")
    parser.add_argument("--out", type=Path, default=Path("out/scaling"), help="a folder")
    parser.add_argument("--tokens", type=int, default=128, help="a rank and step")
    parser.add_argument("--context", type=int, default=128, help="tokens of a sequence")
    add_turn_arguments(parser)
    parser.set_defaults(hosts=2, nproc_per_node=None, timeout=None, rate=LOOPBACK)
    parser.set_defaults(groups=0, vocab_size=256, powersgd_rank=4)  # nobody's
    parser.set_defaults(contestants=[THEIRS, OURS, OTHER], without=[])
    if parser.parse_args().short:
        parser.set_defaults(ranks=[2, 4], models=["1m", "19m"], groups_of=[], rounds=3)
    return parser.parse_args()


def points(arguments: argparse.Namespace) -> list[tuple[str, Any, dict[str, Any]]]:
    """What is to be measured: the axis, the place on it, and what is set there."""
    return [
        *(("ranks", ranks, {"hosts": ranks, "model": "5m"}) for ranks in arguments.ranks),
        *(("parameters", model, {"model": model}) for model in arguments.models),
        *(("groups", n, {"model": "116m", "groups": n}) for n in arguments.groups_of),
    ]


def point(arguments: argparse.Namespace, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Measure one of them."""
    chosen = argparse.Namespace(**vars(arguments) | changes)
    record = take_turns(chosen, arguments.out / f"{name}.json")
    seconds = {row["name"]: row["seconds"] for row in record["rows"]}
    of_fsdp = {
        # Fewer rounds are taken where a step is slow.
        one: [ours / theirs for ours, theirs in zip(taken, seconds[THEIRS], strict=False)]
        for one, taken in seconds.items()
    }
    chosen.rounds, chosen.warmup, chosen.settle = 1, 1, 0
    memory = {}
    for one in (THEIRS, OURS, OTHER):
        chosen.contestants = [one]
        alone = take_turns(chosen, arguments.out / f"{name}-{one}.json")
        memory[one] = alone["peak_bytes"] - alone["bare_bytes"]
    return {
        "model": chosen.model,
        "parameters": record["parameters"],
        "ranks": record["ranks"],
        "groups": record["groups"],
        "seconds": seconds,
        "of_fsdp": of_fsdp,
        "memory_bytes": memory,
    }


def in_words(settings: dict[str, Any]) -> str:
    """What stands in the lines that follow."""
    return (
        f"Ranks of one machine over loopback, {settings['tokens']} tokens a rank and step, fp32, "
        f"qsdp gathers once. Times: medians and spread of {settings['rounds']} rounds, fewer where "
        "a step is slow. Memory: rank 0's peak, less that before a model was made."
    )


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    text = f"{row['axis']:11}{row['model']:>5}{row['ranks']:3} ranks{row['groups']:4} groups"
    memory = row["memory_bytes"]
    text += f"{1e3 * statistics.median(row['seconds'][THEIRS]):9.1f} ms and "
    text += f"{memory[THEIRS] / 1e6:5.0f} MB with FSDP2;"
    for name, label in LABELS.items():
        ratios = row["of_fsdp"][name]
        text += f"  {label} {statistics.median(ratios):.2f} of it"
        text += (
            f" ({min(ratios):.2f}-{max(ratios):.2f}), memory {memory[name] / memory[THEIRS]:.2f}"
        )
    return text


def plot(rows: list[dict[str, Any]], path: Path) -> bool:
    """Plot time and memory of a step as fractions of FSDP2's, a column an axis.

    False without matplotlib.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axes_of = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure, panels = plt.subplots(
        2, len(axes_of), figsize=(4 * len(axes_of), 5.6), squeeze=False, layout="constrained"
    )
    for column, axis in enumerate(axes_of):
        chosen = [row for row in rows if row["axis"] == axis]
        x = [row[axis] for row in chosen]
        times, memories = panels[0][column], panels[1][column]
        for name, label in LABELS.items():
            ratios = [row["of_fsdp"][name] for row in chosen]
            y = [statistics.median(r) for r in ratios]
            below = [m - min(r) for m, r in zip(y, ratios, strict=True)]
            above = [max(r) - m for m, r in zip(y, ratios, strict=True)]
            times.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, label=label)
            memory = [row["memory_bytes"] for row in chosen]
            memories.plot(x, [m[name] / m[THEIRS] for m in memory], marker="o")
        for axes in (times, memories):
            axes.axhline(1.0, color="0.7", linewidth=0.8)
            axes.set_xscale("log")
            if axis != "parameters":
                axes.set_xticks(x, [str(value) for value in x], minor=False)
                axes.minorticks_off()
        memories.set_xlabel(AXES[axis])
    panels[0][0].set_ylabel("seconds a step, FSDP2 fp32 = 1")
    panels[1][0].set_ylabel("peak memory, FSDP2 fp32 = 1")
    panels[0][0].legend(frameon=False)
    save_png(figure, path)
    return True


if __name__ == "__main__":
    main()
