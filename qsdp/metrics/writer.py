"""metrics.jsonl: one JSON object a step, whatever crashes in between."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsWriter:
    """Appends lines to `path` and, if asked, TensorBoard events to a folder.

    A run that goes on after `last_step` drops the lines of later steps first, so that each step has
    one line; a line that a crash tore is dropped as well.
    """

    def __init__(
        self,
        path: Path,
        last_step: int = 0,
        tensorboard: Path | None = None,
        needed: Collection[str] = (),
    ) -> None:
        """
        Args:
            path: the file, made if missing.
            last_step: the last step that is done; 0 begins anew.
            tensorboard: folder of the events; None writes none.
            needed: names that every line has; one without them counts as torn.

        Raises: ValueError if TensorBoard is asked for but not installed or `last_step` is below 0,
            OSError if `path` cannot be written.
        """
        if last_step < 0:
            raise ValueError(f"last_step is {last_step}; choose 0 or more")
        self._path = path
        lines = [line for line in read_metrics(path, needed) if line["step"] <= last_step]
        replacement = path.with_name(path.name + ".tmp")
        with replacement.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        replacement.rename(path)
        self._events = None if tensorboard is None else _event_writer(tensorboard, last_step)
        self._file = path.open("a", encoding="utf-8")

    @property
    def history(self) -> list[dict[str, Any]]:
        """All lines of the run so far, those before a resume included. Read anew: those of a long
        run are not kept in memory."""
        return read_metrics(self._path)

    def log(self, line: dict[str, Any]) -> None:
        """Write one step's `line`, which has a `step`.

        Values are numbers, or dictionaries of such; one that is not finite becomes null.
        """
        line = _finite(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in _flat(line):
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path, needed: Collection[str] = ()) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, which have numbers only and all of the `needed` ones."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if _is_whole(line, needed):
            lines.append(line)
    return lines


def _is_whole(line: Any, needed: Collection[str]) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("step"), int)
        and line.keys() >= set(needed)
        and all(value is None or isinstance(value, (int, float)) for _, value in _flat(line))
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values that are no dictionaries, with the names on the way to them."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _event_writer(folder: Path, last_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs the tensorboard package; run 'pip install tensorboard', or leave "
            "the flag out."
        ) from None
    return SummaryWriter(str(folder), purge_step=last_step + 1)
