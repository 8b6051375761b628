"""What a comparison by link.py is to show, and whether it does."""

from __future__ import annotations

from typing import Any

from benchmarks.support.contestants import OURS, RIVAL
from benchmarks.support.rounds import Record
from benchmarks.wire.link_table import explanations, median_of, ratio

BEST, BEST_SHARDED = "the best qsdp", "the best that shards"
FOUR, EIGHT = "qsdp-w4g4-once-fp32", "qsdp-w8g8-once-fp32"
DELTA = "qsdp-w4g4-delta-fp32"
TARGETS: dict[tuple[str, str], list[tuple[str, str, bool, float]]] = {
    ("100mbit", "19m"): [
        (FOUR, "fsdp-fp32", True, 7.5),
        (FOUR, "zero3-fp32", True, 5.0),
        (FOUR, "ddp-fp32", True, 2.8),
        (EIGHT, "fsdp-fp32", True, 5.0),
        (DELTA, "fsdp-fp32", True, 9.0),
        (DELTA, FOUR, True, 1.0),
        (DELTA, "alone-fp32", False, 1.35),
    ],
    ("1gbit", "19m"): [
        (FOUR, "alone-fp32", False, 1.35),
        (FOUR, "ddp-fp32", True, 1.6),
    ],
    ("loopback", "19m"): [(BEST, BEST_SHARDED, False, 1.10)],
    ("20mbit", "5m"): [(DELTA, "fsdp-fp32", True, 20.0)],
}
"""The targets for two hosts, by their link and the model.
They are (contestant, reference, whether a speed-up of at least or a slow-down of at most, limit).
"""
PARAMETERS = {"5m": (4.5e6, 5.5e6), "19m": (18e6, 20e6)}
"""Between which a model's number of parameters lies, whatever its vocabulary."""

EXPLAINED_WITHIN = 0.05


def verdicts(record: Record) -> list[dict[str, Any]]:
    """What this link was to show, as far as its contestants ran."""
    if record["hosts"] != 2:
        return []
    targets = [
        target
        for (link, model), chosen in TARGETS.items()
        if link == record["link"]
        and PARAMETERS[model][0] < record["parameters"] < PARAMETERS[model][1]
        for target in chosen
    ]
    rows = {row["name"]: row for row in record["rows"]}
    for name, is_one in (
        (BEST, lambda row: row["role"] == OURS),
        (BEST_SHARDED, lambda row: row["role"] == RIVAL and row["shards"]),
    ):
        found = [row for row in record["rows"] if is_one(row)]
        if found:
            rows[name] = min(found, key=median_of)
    verdicts = []
    for name, reference, is_least, limit in targets:
        if name not in rows or reference not in rows:
            continue
        ours, theirs = rows[name], rows[reference]
        value = ratio(theirs, ours) if is_least else ratio(ours, theirs)
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
    """Whether the parts of qsdp's steps make the steps."""
    return [
        at_most(
            f"{record['link']}: {one['what']}, step less its parts, of the step",
            abs(one["off"]),
            EXPLAINED_WITHIN,
        )
        for one in explanations(record)
    ]


def at_most(what: str, value: float, limit: float) -> dict[str, Any]:
    """The verdict on a value that is to be no larger than a limit."""
    is_met = value <= limit
    return {"what": what, "value": value, "limit": limit, "is_least": False, "is_met": is_met}


def in_words(verdict: dict[str, Any]) -> str:
    """The verdict as a line."""
    limit = f"at {'least' if verdict['is_least'] else 'most'} {verdict['limit']}"
    state = "met" if verdict["is_met"] else "MISSED"
    return f"{verdict['what']}: {verdict['value']:.3f}, {limit}: {state}"
