"""From the records of benchmarks/wire/changes.py to its table, its verdicts and its plot.

Bytes a parameter count each value of a gather or a reduce once: of N ranks each sends N - 1 of N
parts of everything, so that they are what a rank sends, times N / (N - 1), a parameter of the
model. With two ranks that is twice what one sends: all changes of all weights, and all gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsdp.report.plots import save_png

Record = dict[str, Any]

GATHER_AT_MOST = {("nano", 4): 0.36, ("nano", 8): 2.5, ("19m", 4): 0.30, ("19m", 8): 2.4}
"""Bits a weight a step, by model and bits of weights."""
STEP_AT_MOST = {("nano", 4): 0.62, ("nano", 3): 0.50, ("19m", 4): 0.60, ("19m", 3): 0.47}
"""Bytes a parameter a step where weights have 4 bits, by model and bits of gradients."""


def per_parameter(record: Record, num_bytes: float) -> float:
    """Bytes a parameter a step, of what a rank sends between the two readings."""
    ranks, steps = record["ranks"], record["to"] - record["since"]
    return num_bytes * ranks / (ranks - 1) / steps / record["parameters"]


def gather_bits(record: Record) -> float:
    """Bits a weight a step of the gathers, by qsdp's counters: frames whole, with headers."""
    return 8 * per_parameter(record, record["counted_gather"])


def step_bytes(record: Record) -> float:
    """Bytes a parameter a step on the interface, less packet headers."""
    return per_parameter(record, record["seen"])


def difference(record: Record) -> float:
    """By how much the interface has more than the counters."""
    return float(record["seen"] / (record["counted_gather"] + record["counted_reduce"]) - 1)


def changed_share(record: Record) -> float:
    """Which part of the coded weights changes its code in a step, on a grid that stays."""
    steps = record["to"] - record["since"]
    return float(record["changed_codes"] / steps / record["coded"])


def name_of(record: Record) -> str:
    """What tells a case from the others, for a reader."""
    return f"{record['model']} W{record['weight_bits']}G{record['grad_bits']} lr {record['lr']:g}"


def table(records: Sequence[Record]) -> str:
    """One line a case."""
    lines = [
        f"{'':28}{'steps':>11}{'codes':>9}{'gather,':>10}{'reduce,':>10}{'a step on':>12}"
        f"{'interface':>11}",
        f"{'':28}{'':>11}{'changed':>9}{'bits/w':>10}{'B/param':>10}{'it, B/param':>12}"
        f"{'of counted':>11}",
    ]
    for record in records:
        steps = f"{record['since']}-{record['to']}"
        reduce = per_parameter(record, record["counted_reduce"])
        lines.append(
            f"{name_of(record):28}{steps:>11}{changed_share(record):9.2%}"
            f"{gather_bits(record):10.3f}{reduce:10.3f}{step_bytes(record):12.3f}"
            f"{1 + difference(record):11.4f}"
        )
    return "\n".join(lines)


def verdicts(records: Sequence[Record], lr: float, steps: int, since: int) -> list[dict[str, Any]]:
    """What the cases with this rate, schedule and first reading are to come to at most."""
    found: list[tuple[str, float, float]] = []
    for record in records:
        if (record["lr"], record["steps"], record["since"]) != (lr, steps, since):
            continue
        model, weights, grads = (record[key] for key in ("model", "weight_bits", "grad_bits"))
        name = f"{model} W{weights}G{grads}"
        if (most := GATHER_AT_MOST.get((model, weights))) is not None:
            found.append((f"{name}: gather, bits a weight a step", gather_bits(record), most))
        if weights == 4 and (most := STEP_AT_MOST.get((model, grads))) is not None:
            found.append((f"{name}: bytes a parameter a step", step_bytes(record), most))
    return [
        {"what": what, "measured": value, "at_most": most, "is_met": value <= most}
        for what, value, most in found
    ]


def plot(records: Sequence[Record], path: Path) -> bool:
    """Draw the share of changed codes and the bytes of each step, by bits and learning rate.

    False without matplotlib, or without a case of the nano model that took all of its steps.
    """
    shown = [
        record
        for record in records
        if record["model"] == "nano"
        and record["to"] == record["steps"]
        and record["grad_bits"] == 4
    ]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not shown:
        return False
    bits = sorted({record["weight_bits"] for record in shown})
    rates = sorted({record["lr"] for record in shown}, reverse=True)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for record in sorted(shown, key=lambda each: (each["weight_bits"], -each["lr"])):
        style = {
            "color": f"C{bits.index(record['weight_bits'])}",
            "linestyle": ("-", "--", ":", "-.")[rates.index(record["lr"]) % 4],
            "linewidth": 1.2,
            "label": f"{record['weight_bits']} bits, rate {record['lr']:g}",
        }
        steps = [line["step"] for line in record["series"]]
        changed = [line["changed_codes"] / record["coded"] for line in record["series"]]
        factor = 8 * record["ranks"] / (record["ranks"] - 1) / record["parameters"]
        sent = [factor * line["gather_sent_bytes"] for line in record["series"]]
        left.plot(steps, changed, **style)
        right.plot(steps, sent, **style)
    left.set(ylabel="codes that change in a step, of all")
    right.set(ylabel="bits a weight a step, frames whole")
    for axes in (left, right):
        axes.set(yscale="log", xlabel="step")
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right", fontsize=7, frameon=False)
    figure.suptitle(
        f'gather="delta" over a training: nano, {shown[0]["steps"]} steps, rates rise for a '
        f"tenth and fall to a tenth, means of 10 steps",
        fontsize=9,
    )
    save_png(figure, path)
    return True
