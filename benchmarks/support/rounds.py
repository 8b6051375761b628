"""Rounds of a comparison as they are kept on disk, and what is still to be done.

A file holds the settings and all finished rounds, and is replaced whole after each. A round is, by
contestant, the seconds of one step (the slowest rank's), bytes sent and where qsdp's time went.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.support.runs import Mistake
from qsdp.common.json_files import json_value, write_json

Record = dict[str, Any]

SLOW_S, SLOW_ROUNDS = 10.0, 3
"""So many rounds are enough of a contestant whose median step is longer."""


def kept(path: Path, settings: Record, empty: Record) -> Record:
    """What an earlier call with the same settings has left at ``path``, which is begun if none has.

    Raises Mistake if it was made with other settings, or is damaged.
    """
    settings = json_value(settings)
    if not path.exists():
        record = {"settings": settings} | empty
        write_json(path, record)
        return record
    record = read(path)
    difference = differs(record.get("settings", {}), settings)
    if difference is not None:
        name, old, new = difference
        raise Mistake(
            f"{path} was begun with {name} {old}, not {new}: give another --out, or remove that "
            "file."
        )
    return record


def read(path: Path) -> Record:
    """A record. Raises Mistake if it is none."""
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}): give another folder.") from None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise Mistake(f"{path} is not a record of a comparison: give another folder.")
    return record


def differs(old: Record, new: Record, but: tuple[str, ...] = ()) -> tuple[str, Any, Any] | None:
    """The first setting that is not the same in both, and its values."""
    for name in dict.fromkeys([*new, *old]):
        if name not in but and old.get(name) != new.get(name):
            return name, old.get(name), new.get(name)
    return None


def due(rounds: list[Record], names: list[str], wanted: int) -> list[str]:
    """Who still has to take a step for ``wanted`` rounds; a slow one for fewer."""
    return [name for name in names if _is_due(seconds_of(rounds, name), wanted)]


def seconds_of(rounds: list[Record], name: str) -> list[float]:
    """A contestant's steps. It was in all rounds up to its last."""
    return [taken[name]["seconds"] for taken in rounds if name in taken]


def _is_due(seconds: list[float], wanted: int) -> bool:
    if len(seconds) >= SLOW_ROUNDS and statistics.median(seconds) > SLOW_S:
        return False
    return len(seconds) < wanted
