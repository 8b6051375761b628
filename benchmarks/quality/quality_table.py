"""From the records of benchmarks/quality/quality.py to its table, its verdicts and its plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.quality.quality_wires import GATHERS, WIRES
from benchmarks.support.runs import Record
from qsdp.report.plots import save_png


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one wire."""

    wire: str
    method: str
    val_loss: list[float]
    """Nats a token of the exact weights, by seed."""
    minus_fp32: list[float] | None
    """The same less fp32's with the same seed; None where fp32 was not run."""
    bytes_per_parameter: dict[str, float]
    """Bytes a parameter a step, by how the wire gathers: ``twice``, ``once``, ``delta``."""

    @property
    def mean_gap(self) -> float | None:
        """The mean of the gaps over the seeds."""
        return None if self.minus_fp32 is None else statistics.mean(self.minus_fp32)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the gap over the seeds; None for one seed."""
        if self.minus_fp32 is None or len(self.minus_fp32) < 2:
            return None
        return statistics.stdev(self.minus_fp32)


def bytes_per_parameter(record: Record) -> float:
    """Bytes a parameter a step, each value of a gather or a reduce counted once.

    A rank sends N - 1 of N shards in every collective, so what it sends is (N - 1) / N of this.
    For stock FSDP2 they are those of fp32 with each value moved once: over gloo it would be charged
    for a reduce-scatter that is an all-reduce inside.
    """
    is_stock = WIRES[record["wire"]].method == "fp32"
    sent = record["fp32_bytes_per_step" if is_stock else "sent_bytes_per_step"]
    ranks = record["ranks"]
    return sent * ranks / (ranks - 1) / record["parameters"]


def make_rows(trainings: Iterable[Record], bytes_runs: Iterable[Record]) -> list[Row]:
    """One row a wire, in the order in which the wires were asked for.

    Args:
        trainings: Records of whole runs, the same seeds for every wire.
        bytes_runs: Records of the few steps in which each wire gathered the other way.
    """
    by_wire: dict[str, dict[int, Record]] = {}
    for record in trainings:
        by_wire.setdefault(record["wire"], {})[record["seed"]] = record
    counted: dict[str, dict[str, float]] = {}
    firsts = [next(iter(by_seed.values())) for by_seed in by_wire.values()]
    for record in [*firsts, *bytes_runs]:
        counted.setdefault(record["wire"], {})[record["gather"]] = bytes_per_parameter(record)
    base = by_wire.get("fp32")
    rows = []
    for wire, by_seed in by_wire.items():
        losses = {seed: record["val_loss"] for seed, record in sorted(by_seed.items())}
        gaps = None
        if base is not None and wire != "fp32":
            gaps = [loss - base[seed]["val_loss"] for seed, loss in losses.items()]
        rows.append(
            Row(
                wire=wire,
                method=WIRES[wire].method,
                val_loss=[*losses.values()],
                minus_fp32=gaps,
                bytes_per_parameter=counted[wire],
            )
        )
    return rows


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for quality.json."""
    return [asdict(row) | {"mean_gap": row.mean_gap, "spread": row.spread} for row in rows]


def make_table(rows: Sequence[Row], title: str) -> Table:
    """The rows for a reader."""
    table = Table(title=title)
    table.add_column("wire", no_wrap=True)
    for column in ("loss", "minus fp32", "spread", "by seed"):
        table.add_column(column, justify="right", no_wrap=True)
    for gather in GATHERS:
        table.add_column(f"B/param/step\ngathered {gather}", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.wire,
            f"{statistics.mean(row.val_loss):.4f}",
            "" if row.mean_gap is None else f"{row.mean_gap:+.4f}",
            "" if row.spread is None else f"{row.spread:.4f}",
            " ".join(f"{gap:+.4f}" for gap in row.minus_fp32 or []),
            *(
                f"{row.bytes_per_parameter[gather]:.3f}"
                if gather in row.bytes_per_parameter
                else ""
                for gather in GATHERS
            ),
        )
    return table


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the default wires promise, and whether they kept it here."""
    by_wire = {row.wire: row for row in rows}
    four = by_wire.get("w4g4-default")
    eight = by_wire.get("w8g8-default") or by_wire.get("w8g8-shift")
    found: list[tuple[str, float | None, float]] = []
    if four is not None:
        found += [("W4G4 minus fp32, nats", four.mean_gap, 0.02)]
        found += [
            (f"W4G4 bytes a parameter a step, gathered {gather}", value, most)
            for gather, most in (("twice", 1.7), ("once", 1.15))
            if (value := four.bytes_per_parameter.get(gather)) is not None
        ]
    if eight is not None:
        found += [("W8G8 minus fp32, nats", eight.mean_gap, 0.005)]
    for name, what, whole, its in (
        ("w4g4-delta", "W4 delta with G4", four or by_wire.get("w4g4-dither"), "W4G4"),
        ("w8g8-delta", "W8 delta with G8", eight, "W8G8"),
    ):
        if name in by_wire and whole is not None:
            above = statistics.mean(by_wire[name].val_loss) - statistics.mean(whole.val_loss)
            found += [(f"{what} minus {its}, nats", above, 0.005)]
    return [
        {"what": what, "measured": value, "at_most": most, "is_met": value <= most}
        for what, value, most in found
        if value is not None
    ]


def plot(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Draw loss gap against bytes into a PNG file. False without matplotlib, or without gaps."""
    shown = [row for row in rows if row.minus_fp32 is not None]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not shown:
        return False
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate(dict.fromkeys(row.method for row in shown)):
        gather = {"default": "once", "delta": "delta"}.get(method, "twice")
        points = sorted(
            (row.bytes_per_parameter[gather], row.mean_gap or 0.0, row.spread or 0.0, row.wire)
            for row in shown
            if row.method == method and gather in row.bytes_per_parameter
        )
        if not points:
            continue
        counts, gaps, spreads, names = zip(*points, strict=True)
        axes.errorbar(
            counts,
            gaps,
            yerr=spreads,
            fmt="*" if method == "default" else "o-",
            markersize=11 if method == "default" else 5,
            capsize=3,
            color=f"C{number}",
            label=f"{method}, gathered {gather}",
        )
        for count, gap, name in zip(counts, gaps, names, strict=True):
            axes.annotate(
                name.partition("-")[0],
                (count, gap),
                textcoords="offset points",
                xytext=(4, 5),
                fontsize=7,
            )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="bytes a parameter a step",
        ylabel="validation loss minus fp32's, nats",
        title=title,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save_png(figure, path)
    return True
