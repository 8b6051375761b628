"""Tables, targets and the plot of a comparison by link.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from qsdp.train.plots import save_png

Record = dict[str, Any]

REFERENCES = {
    "fsdp-fp32": "FSDP2 fp32",
    "fsdp-bf16": "FSDP2 bf16",
    "qsdp-32": "qsdp fp32",
    "qsdp-16": "qsdp bf16",
    "zero3-bf16": "ZeRO-3 bf16",
}
"""Whom every row is held against. gloo's reduce-scatter moves about twice the bytes of qsdp's own
all-to-all, so FSDP2 stands beside its values over qsdp's collectives."""

BEST = "the best qsdp"
TARGETS: dict[str, list[tuple[str, str, bool, float]]] = {
    "100mbit": [
        (BEST, "fsdp-fp32", True, 10.0),
        (BEST, "fsdp-bf16", True, 5.0),
        (BEST, "zero3-bf16", True, 4.0),
        ("qsdp-w8g8-twice-fp32", "fsdp-fp32", True, 3.7),
    ],
    "1gbit": [
        (BEST, "alone-bf16", False, 1.25),
        (BEST, "fsdp-bf16", True, 1.8),
        (BEST, "zero3-bf16", True, 1.3),
    ],
    "loopback": [(BEST, "the best FSDP2", False, 1.10)],
}
"""By link, for two hosts and the 19m model: (contestant, reference, whether a speed-up of at least
or a slow-down of at most, limit)."""

EXPLAINED_WITHIN = 0.05


def table(record: Record) -> str:
    """One line a contestant."""
    rows = {row["name"]: row for row in record["rows"]}
    references = [name for name in REFERENCES if name in rows]
    lines = [
        f"{record['parameters'] / 1e6:.1f}M parameters, {record['ranks']} ranks on "
        f"{record['hosts']} hosts, link {record['link']}",
        f"{record['tokens']} tokens a rank and step, threads a rank: {record['threads']}; medians "
        f"of {len(record['rows'][0]['seconds'])} rounds",
        f"{'':36}{'ms':>8}{'spread':>16}{'MB sent':>9}{'faster than:':>14}",
        f"{'':69}" + "".join(f"{REFERENCES[name]:>14}" for name in references),
    ]
    for row in rows.values():
        seconds = row["seconds"]
        spread = f"{1e3 * min(seconds):.0f}-{1e3 * max(seconds):.0f}"
        sent = statistics.median(row["sent_bytes"]) / 1e6
        line = f"{row['what']:36}{1e3 * statistics.median(seconds):8.0f}{spread:>16}{sent:9.2f}"
        line += "".join(f"{_ratio(rows[name], row):13.2f}x" for name in references)
        lines.append(line)
    return "\n".join(lines)


def verdicts(record: Record) -> list[dict[str, Any]]:
    """What this link was to show, as far as its contestants ran."""
    if record["hosts"] != 2 or not 18e6 < record["parameters"] < 20e6:
        return []
    rows = {row["name"]: row for row in record["rows"]}
    for name, prefix in ((BEST, "qsdp-w"), ("the best FSDP2", "fsdp-")):
        found = [
            row
            for row in rows.values()
            if row["name"].startswith(prefix) and "alone" not in row["name"]
        ]
        if found:
            rows[name] = min(found, key=lambda row: statistics.median(row["seconds"]))
    verdicts = []
    for name, reference, is_least, limit in TARGETS.get(record["link"], []):
        if name not in rows or reference not in rows:
            continue
        ours, theirs = rows[name], rows[reference]
        value = _ratio(theirs, ours) if is_least else _ratio(ours, theirs)
        relation = "faster than" if is_least else "times as long as"
        verdicts.append(
            {
                "what": f"{record['link']}: {ours['what']} is {relation} {theirs['what']}",
                "value": value,
                "limit": limit,
                "is_least": is_least,
                "is_met": value >= limit if is_least else value <= limit,
            }
        )
    return verdicts


def adds_up(record: Record) -> list[dict[str, Any]]:
    """Whether encode + wire + decode + computation make the step: the computation is FSDP2's over
    one rank, of the same round."""
    rows = {row["name"]: row for row in record["rows"]}
    found = []
    for row in rows.values():
        alone = rows.get(f"fsdp-alone-{row['name'].rpartition('-')[2]}")
        if not row["parts"] or alone is None:
            continue
        explained = [
            (sum(parts.values()) + compute) / seconds
            for parts, compute, seconds in zip(
                row["parts"], alone["seconds"], row["seconds"], strict=True
            )
        ]
        value = abs(statistics.median(explained) - 1)
        found.append(
            {
                "what": f"{record['link']}: {row['what']}, step less encode, wire, decode and "
                "computation, of the step",
                "value": value,
                "limit": EXPLAINED_WITHIN,
                "is_least": False,
                "is_met": value <= EXPLAINED_WITHIN,
            }
        )
    return found


def plot(record: Record, path: Path) -> bool:
    """Bars of seconds a step; of qsdp's the share of encode, wire and decode. False without
    matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = record["rows"][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(rows) + 1.6), layout="constrained")
    medians = [statistics.median(row["seconds"]) for row in rows]
    axes.barh([row["what"] for row in rows], medians, color="0.82", label="computation, the rest")
    phases = {"encode": "tab:orange", "wire": "tab:blue", "decode": "tab:green"}
    left = [0.0] * len(rows)
    for phase, colour in phases.items():
        widths = [
            statistics.median(
                sum(value for name, value in parts.items() if phase in name)
                for parts in row["parts"] or [{}]
            )
            for row in rows
        ]
        axes.barh([row["what"] for row in rows], widths, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, median in enumerate(medians):
        axes.text(median, place, f" {median:.2f}", va="center", fontsize=8)
    axes.set_xlabel("seconds a step")
    axes.set_title(
        f"{record['parameters'] / 1e6:.0f}M parameters, {record['hosts']} hosts, "
        f"link {record['link']}",
        fontsize=10,
    )
    axes.legend(fontsize=8, frameon=False)
    save_png(figure, path)
    return True


def _ratio(over: dict[str, Any], under: dict[str, Any]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(over["seconds"], under["seconds"], strict=True))
