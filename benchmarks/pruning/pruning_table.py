"""From the records of benchmarks/pruning/pruning.py to its tables, its verdicts and its plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.pruning.pruning_methods import METHODS, TARGETS
from benchmarks.support.runs import Record
from qsdp.report.plots import save_png

COLUMNS = ("dense", *TARGETS)
PRUNED = ("0.5", "0.6", "0.7", "0.8", "0.9")
TWIN = "acdc-twin"
WIRE_LIMIT = 0.02

Losses = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one method, number of steps and wire."""

    method: str
    """A key of METHODS, or ``acdc-twin``: the dense twin of the row before."""
    wire: str
    steps: int
    seeds: list[int]
    losses: Losses = field(default_factory=dict)
    """Nats a token, by column and then by seed."""
    base: list[float] = field(default_factory=list)
    """The dense model's loss, by seed: for AC/DC the dense twin's."""

    @property
    def label(self) -> str:
        """The row's name for a reader."""
        name = "  its dense twin" if self.method == TWIN else METHODS[self.method].label
        return name if self.wire == "stock" else f"{name}, {self.wire}"

    @property
    def passes(self) -> int:
        """Forward and backward passes of the whole training."""
        return self.steps * (1 if self.method == TWIN else METHODS[self.method].passes)

    def gaps(self, column: str) -> list[float]:
        """Loss in a column less that of the dense model, by seed."""
        return [loss - base for loss, base in zip(self.losses[column], self.base, strict=True)]


def make_rows(records: Iterable[Record], split: str = "test") -> list[Row]:
    """One row a method, number of steps and wire, in order of compute.

    Twins follow their model, on the validation split (``val``) without a row of their own.
    """
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        key = (record["method"], record["wire"], record["steps"])
        groups.setdefault(key, []).append(record)
    order = [*METHODS]
    rows = []
    for (method, wire, steps), group in sorted(
        groups.items(),
        key=lambda item: (item[0][2] * METHODS[item[0][0]].passes, order.index(item[0][0])),
    ):
        group = sorted(group, key=lambda record: record["seed"])
        seeds = [record["seed"] for record in group]
        losses = {column: [_number(r[split][column]) for r in group] for column in COLUMNS}
        twin: Losses = {}
        if split == "test" and all(record["twin_test"] is not None for record in group):
            twin = {column: [_number(r["twin_test"][column]) for r in group] for column in COLUMNS}
            base = twin["dense"]
        elif all(record["twin_val"] is not None for record in group):
            base = [record["twin_val"] for record in group]
        else:
            base = losses["dense"]
        common: dict[str, Any] = {"wire": wire, "steps": steps, "seeds": seeds, "base": base}
        rows.append(Row(method=method, losses=losses, **common))
        if twin:
            rows.append(Row(method=TWIN, losses=twin, **common))
    return rows


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for pruning.json."""
    return [asdict(row) | {"label": row.label.strip(), "passes": row.passes} for row in rows]


def loss_table(rows: Sequence[Row], title: str) -> Table:
    """The losses for a reader."""
    table = _table(title, COLUMNS)
    for row in rows:
        cells = (_cell(row.losses[column], "") for column in COLUMNS)
        table.add_row(row.label, f"{row.steps}", f"{row.passes}", *cells)
    return table


def gap_table(rows: Sequence[Row], title: str) -> Table:
    """What compression costs, for a reader."""
    table = _table(title, COLUMNS)
    for row in rows:
        cells = (_cell(row.gaps(column), "+") for column in COLUMNS)
        table.add_row(row.label, f"{row.steps}", f"{row.passes}", *cells)
    return table


def verdicts(rows: Sequence[Row], steps: int, lead: float) -> list[dict[str, Any]]:
    """What the methods promise, and whether they kept it here; ``below`` is None for mere figures.

    Args:
        steps: The steps of CrAM: twice as many of the others are equal compute.
        lead: Nats by which CrAM+-Multi is to be ahead of AdamW at 80 and 90 %.
    """
    by_key = {(row.method, row.steps): row for row in rows if row.wire == "stock"}
    multi, adamw = by_key.get(("cram-multi", steps)), by_key.get(("adamw", 2 * steps))
    acdc, gmp = by_key.get(("acdc", 2 * steps)), by_key.get(("gmp", 2 * steps))
    found: list[dict[str, Any]] = []
    if multi is not None:
        found += [
            _verdict(f"CrAM+-Multi at {name} less its dense", multi.gaps(column), most, aim)
            for column, name, most, aim in (("0.7", "70 %", 0.06, 0.02), ("0.9", "90 %", 0.15, 0.1))
        ]
    if multi is not None and adamw is not None:
        found += [
            _verdict(
                f"CrAM+-Multi less AdamW at equal compute, {name}",
                _differences(multi, adamw, column),
                most,
            )
            for column, name, most in (
                ("0.7", "70 %", 0.0),
                ("0.8", "80 %", -lead),
                ("0.9", "90 %", -lead),
                ("dense", "dense", None),
            )
        ]
    if acdc is not None and gmp is not None:
        what = "AC/DC less GMP at equal compute, 90 %"
        found.append(_verdict(what, _differences(acdc, gmp, "0.9"), 0.0))
    return found


def wire_verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The column whose mean loss is furthest from that of stock FSDP2, by method and wire."""
    stock = {(row.method, row.steps): row for row in rows if row.wire == "stock"}
    found = []
    for row in rows:
        base = stock.get((row.method, row.steps))
        if row.wire == "stock" or base is None:
            continue
        means = {c: statistics.mean(_differences(row, base, c)) for c in COLUMNS}
        worst = max(means, key=lambda column: abs(means[column]))
        name = "AC/DC's dense twin" if row.method == TWIN else METHODS[row.method].label
        found.append(
            {
                "what": f"{name}, {row.wire} wire less full precision, at worst ({worst})",
                "measured": means[worst],
                "below": WIRE_LIMIT,
                "is_met": abs(means[worst]) <= WIRE_LIMIT,
                "by_column": means,
            }
        )
    return found


def plot(rows: Sequence[Row], path: Path, title: str, split: str) -> bool:
    """Draw loss against sparsity into a PNG file. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    most = max(row.passes for row in rows)
    colours = {name: f"C{number}" for number, name in enumerate([*METHODS, TWIN])}
    styles = dict(zip(dict.fromkeys(row.wire for row in rows), ("-", "--", ":"), strict=False))
    for row in rows:
        if row.passes != most:
            continue
        means = [statistics.mean(row.losses[column]) for column in ("dense", *PRUNED)]
        spreads = [_spread(row.losses[column]) or 0.0 for column in ("dense", *PRUNED)]
        axes.errorbar(
            [0, *(100 * float(column) for column in PRUNED)],
            means,
            yerr=spreads,
            marker="o",
            markersize=4,
            capsize=2,
            linestyle=styles[row.wire],
            color=colours[row.method],
            label=row.label.strip(),
        )
    axes.set(xlabel="% of the prunable weights pruned in one shot", ylabel=f"{split} loss, nats")
    axes.set_title(f"{title}, equal compute", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save_png(figure, path)
    return True


def _differences(row: Row, base: Row, column: str) -> list[float]:
    """The differences of the losses, seed by seed."""
    theirs = dict(zip(base.seeds, base.losses[column], strict=True))
    ours = zip(row.seeds, row.losses[column], strict=True)
    return [loss - theirs[seed] for seed, loss in ours]


def _verdict(
    what: str, values: Sequence[float], below: float | None, aim: float | None = None
) -> dict[str, Any]:
    mean = statistics.mean(values)
    # A lead of nothing is no lead.
    is_met = below is None or (mean < 0 if below == 0 else mean <= below)
    return {
        "what": what,
        "measured": mean,
        "by_seed": [*values],
        "below": below,
        "aim": aim,
        "is_met": is_met,
    }


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for column in ("steps", "passes", *columns):
        shown = f"{100 * float(column):.0f} %" if column in PRUNED else column
        table.add_column(shown.replace("4bit", "4-bit"), justify="right", no_wrap=True)
    return table


def _cell(values: Sequence[float], sign: str) -> str:
    spread = _spread(values)
    mean = f"{statistics.mean(values):{sign}.3f}"
    return mean if spread is None else f"{mean} ±{spread:.3f}"


def _spread(values: Sequence[float]) -> float | None:
    """Standard deviation; None for one seed."""
    return statistics.stdev(values) if len(values) > 1 else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
