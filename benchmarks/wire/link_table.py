"""Tables and the plot of a comparison by link.py.

Every ratio is the median over rounds of two steps in the same round.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.support.contestants import FLOOR, OURS, RIVAL
from benchmarks.support.losses import powersgd_start
from benchmarks.support.rounds import SLOW_ROUNDS, SLOW_S, Record
from qsdp.report.plots import save_png

Row = dict[str, Any]
FIRST = "fsdp-fp32"
PHASES = ("encode", "wire", "decode")


def ratio(over: Row, under: Row) -> float:
    """The ratio of two rows' steps, over the rounds both were in: slow contestants take fewer."""
    return statistics.median(a / b for a, b in zip(over["seconds"], under["seconds"], strict=False))


def median_of(row: Row) -> float:
    """Seconds a step."""
    return statistics.median(row["seconds"])


def references(record: Record) -> dict[str, Row]:
    """The rows that every row is held against, as far as they took part.

    They are FSDP2 in fp32, the best rival that shards weights and optimizer state, and the best of
    all rivals.
    """
    found = {row["name"]: row for row in record["rows"] if row["name"] == FIRST}
    rivals = [row for row in record["rows"] if row["role"] == RIVAL]
    for name, rows in (
        ("the best that shards", [row for row in rivals if row["shards"]]),
        ("the best rival", rivals),
    ):
        if rows:
            found[name] = min(rows, key=median_of)
    return found


def table(record: Record) -> str:
    """One line a contestant."""
    rows = record["rows"]
    against = references(record)
    num_rounds = max(len(row["seconds"]) for row in rows)
    lines = [
        f"{record['parameters'] / 1e6:.1f}M parameters, {record['ranks']} ranks on "
        f"{record['hosts']} hosts, link {record['link']}, {record['tokens']} tokens a rank "
        "and step",
        f"medians of {num_rounds} rounds, {SLOW_ROUNDS} where a step takes over {SLOW_S:.0f} s; "
        "as fast as: the median over rounds",
    ]
    losses = record.get("losses")
    if losses:
        lines.append(losses_in_words(losses))
    for name, row in against.items():
        if name != FIRST:
            lines.append(f"{name}: {row['what']}")
    heads = {FIRST: "FSDP2 fp32", "the best that shards": "best sharded"}
    head = f"{'':42}{'ms':>8}{'spread':>14}{'MB sent':>9}"
    head += "".join(f"{heads.get(name, 'best rival'):>14}" for name in against)
    head += f"{'train loss':>12}{'val loss':>10}" if losses else ""
    lines += ["", head]
    for row in rows:
        seconds = row["seconds"]
        spread = f"{1e3 * min(seconds):.0f}-{1e3 * max(seconds):.0f}"
        sent = statistics.median(row["sent_bytes"]) / 1e6
        line = f"{row['what']:42}{1e3 * median_of(row):8.0f}{spread:>14}{sent:9.2f}"
        line += "".join(f"{ratio(other, row):13.2f}x" for other in against.values())
        if losses and (loss := losses["rows"].get(row["name"])):
            line += f"{_nats(loss['train_loss']):>12}{_nats(loss['val_loss']):>10}"
        lines.append(line)
    return "\n".join(lines)


def losses_in_words(losses: Record) -> str:
    """What the columns of losses are, and are not."""
    settings, row = losses["settings"], next(iter(losses["rows"].values()))
    schedule = settings.get("schedule", "at a constant rate")
    return (
        f"losses, nats a token: of a model of {row['parameters'] / 1e6:.1f}M after "
        f"{settings['loss_steps']} steps of {settings['loss_tokens']} tokens a rank on "
        f"{settings['data']}, {schedule}, one seed, without a slow link; training: mean of the "
        f"last tenth; PowerSGD compresses from step {powersgd_start(settings['loss_steps'])} on"
    )


def explanations(record: Record) -> list[dict[str, Any]]:
    """What each of qsdp's steps is made of: medians in seconds.

    It also says by how much of the step their sum, taken in each round, is off. FSDP2's own copies
    are what FSDP2 takes over one rank beyond the floor; a wire is what was waited for.
    """
    rows = {row["name"]: row for row in record["rows"]}
    found = []
    for row in rows.values():
        precision = row["name"].rpartition("-")[2]
        floor, alone = rows.get(f"alone-{precision}"), rows.get(f"fsdp-alone-{precision}")
        if not any(row["parts"]) or floor is None or alone is None:
            continue
        parts = {
            name: statistics.median(taken[name] for taken in row["parts"])
            for name in row["parts"][0]
        }
        off = [
            (sum(taken.values()) + compute) / seconds - 1
            for taken, compute, seconds in zip(
                row["parts"], alone["seconds"], row["seconds"], strict=False
            )
        ]
        found.append(
            {
                "what": row["what"],
                "floor_s": median_of(floor),
                "copies_s": median_of(alone) - median_of(floor),
                **parts,
                "sum_s": median_of(alone) + sum(parts.values()),
                "measured_s": median_of(row),
                "off": statistics.median(off),
            }
        )
    return found


def explanation_table(found: list[dict[str, Any]]) -> str:
    """The parts in milliseconds, a line a contestant."""
    keys = ["floor_s", "copies_s"]
    keys += [f"{way}_{phase}_s" for way in ("gather", "reduce") for phase in PHASES]
    keys += ["sum_s", "measured_s"]
    heads = ["floor", "copies", *PHASES, *PHASES, "sum", "measured", "off"]
    lines = [
        "what a step is made of, ms: computation, FSDP2's copies, and what qsdp's collectives took",
        f"{'':60}{'gather':>15}{'reduce':>27}",
        f"{'':42}" + "".join(f"{head:>9}" for head in heads),
    ]
    for one in found:
        line = f"{one['what']:42}" + "".join(f"{1e3 * one[key]:9.0f}" for key in keys)
        lines.append(f"{line}{100 * one['off']:+8.1f}%")
    return "\n".join(lines)


def plot(record: Record, path: Path) -> bool:
    """Draw bars of seconds a step; of qsdp's the share of encode, wire and decode.

    False without matplotlib.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = record["rows"][::-1]
    names = [row["what"] for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(rows) + 1.6), layout="constrained")
    medians = [median_of(row) for row in rows]
    axes.barh(names, medians, color="0.82", label="computation, the rest")
    colours = dict(zip(PHASES, ("tab:orange", "tab:blue", "tab:green"), strict=True))
    left = [0.0] * len(rows)
    for phase, colour in colours.items():
        widths = [
            statistics.median(
                sum(value for name, value in parts.items() if phase in name)
                for parts in row["parts"]
            )
            for row in rows
        ]
        axes.barh(names, widths, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    losses = record.get("losses", {}).get("rows", {})
    for place, row in enumerate(rows):
        text = f" {medians[place]:.2f}"
        if row["name"] in losses:
            text += f"   (loss {_nats(losses[row['name']]['val_loss'])})"
        axes.text(medians[place], place, text, va="center", fontsize=8)
    axes.margins(x=0.25)
    for row in rows:
        if row["role"] == FLOOR and row["name"].endswith("fp32"):
            axes.axvline(median_of(row), color="0.5", linewidth=0.8, linestyle=":")
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["role"] == OURS else "normal")
    axes.set_xlabel("seconds a step")
    axes.set_title(
        f"{record['parameters'] / 1e6:.0f}M parameters, {record['hosts']} hosts, "
        f"link {record['link']}",
        fontsize=10,
    )
    axes.legend(fontsize=8, frameon=False)
    save_png(figure, path)
    return True


def _nats(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
