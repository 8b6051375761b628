"""Cost of a step against ranks, parameters and groups, and memory beside plain FSDP2's.

    python benchmarks/scaling.py --out out/scaling

Everything runs in processes of this machine over loopback, without a slow link: what is seen is the
processor's work, of which every rank has less the more ranks share the cores. FSDP2 and qsdp take
turns in one job (see contestants.py), and the ratio is the median over rounds, with its spread.

Memory is the largest resident set of rank 0 in a job of one contestant, less that of the same job
before any model was made: it includes whatever the allocator keeps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import machine
from contestants import add_arguments
from race import LOOPBACK, take_turns
from steps import MODELS

from qsdp.files import write_json
from qsdp.train.plots import save_png

THEIRS, OURS = "fsdp-fp32", "qsdp-w8g8-once-fp32"
OTHER = "qsdp-w4g4-once-fp32"
AXES = {"ranks": "ranks", "parameters": "parameters", "groups": "groups of blocks"}


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings: list[tuple[str, dict[str, Any]]] = []
    settings += [("ranks", {"hosts": ranks, "model": "5m"}) for ranks in arguments.ranks]
    settings += [("parameters", {"model": model, "memory": True}) for model in arguments.models]
    settings += [("groups", {"model": "116m", "groups": groups}) for groups in arguments.groups_of]
    rows = []
    try:
        for axis, changes in settings:
            rows.append({"axis": axis} | point(arguments, changes))
            print(line(rows[-1]), flush=True)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    described = machine.describe()
    write_json(arguments.out / "scaling.json", {"machine": described, "rows": rows})
    print(machine.one_line(described))
    if not plot(rows, arguments.out / "scaling.png"):
        print("no plot: it needs matplotlib")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8], help="with 5m")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--groups-of", type=int, nargs="*", default=[1, 3, 6, 12], help="groups of blocks, 116m"
    )
    parser.add_argument("--out", type=Path, default=Path("out/scaling"), help="a folder")
    add_arguments(parser)
    parser.set_defaults(hosts=2, nproc_per_node=None, timeout=None, rate=LOOPBACK)
    parser.set_defaults(tokens=128, context=128, contestants=[THEIRS, OURS, OTHER])
    return parser.parse_args()


def point(arguments: argparse.Namespace, changes: dict[str, Any]) -> dict[str, Any]:
    """One setting."""
    chosen = argparse.Namespace(**vars(arguments) | changes)
    record = take_turns(chosen)
    seconds = {row["name"]: row["seconds"] for row in record["rows"]}
    found: dict[str, Any] = {
        "model": chosen.model,
        "parameters": record["parameters"],
        "ranks": record["ranks"],
        "groups": record["groups"],
        "seconds": seconds,
        "of_fsdp": {
            name: [
                ours / theirs
                # Fewer rounds are taken where a step is slow.
                for ours, theirs in zip(taken, seconds[THEIRS], strict=False)
            ]
            for name, taken in seconds.items()
        },
    }
    if changes.get("memory"):
        chosen.rounds, chosen.warmup = 1, 1
        found["memory_bytes"] = {}
        for name in (THEIRS, OURS, OTHER):
            chosen.contestants = [name]
            alone = take_turns(chosen)
            found["memory_bytes"][name] = alone["peak_rss_bytes"] - alone["bare_rss_bytes"]
    return found


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    text = f"{row['axis']:11}{row['model']:>5}{row['ranks']:3} ranks{row['groups']:4} groups"
    text += f"{1e3 * statistics.median(row['seconds'][THEIRS]):9.1f} ms FSDP2;"
    for name, label in ((OURS, "W8G8"), (OTHER, "W4G4")):
        ratios = row["of_fsdp"][name]
        text += f"  {label} {statistics.median(ratios):.2f} of it"
        text += f" ({min(ratios):.2f}-{max(ratios):.2f})"
        if "memory_bytes" in row:
            memory = row["memory_bytes"]
            text += f", memory {memory[name] / memory[THEIRS]:.2f}"
    if "memory_bytes" in row:
        text += f" of {row['memory_bytes'][THEIRS] / 1e6:.0f} MB"
    return text


def plot(rows: list[dict[str, Any]], path: Path) -> bool:
    """Time of a step as a fraction of FSDP2's, a panel an axis. False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axes_of = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure, panels = plt.subplots(
        1, len(axes_of), figsize=(4 * len(axes_of), 3.4), squeeze=False, layout="constrained"
    )
    for axes, axis in zip(panels[0], axes_of, strict=True):
        chosen = [row for row in rows if row["axis"] == axis]
        x = [row[axis] for row in chosen]
        for name, label in ((OURS, "W8G8"), (OTHER, "W4G4")):
            ratios = [row["of_fsdp"][name] for row in chosen]
            y = [statistics.median(r) for r in ratios]
            below = [m - min(r) for m, r in zip(y, ratios, strict=True)]
            above = [max(r) - m for m, r in zip(y, ratios, strict=True)]
            axes.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, label=label)
        axes.axhline(1.0, color="0.7", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel(AXES[axis])
    panels[0][0].set_ylabel("seconds a step, FSDP2 fp32 = 1")
    panels[0][0].legend(frameon=False)
    save_png(figure, path)
    return True


if __name__ == "__main__":
    main()
