"""metrics.jsonl: one JSON object a step, whatever crashes in between."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from qsdp.files import finite, replacing


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
        source: Path | None = None,
    ) -> None:
        """
        Args:
            path: the file, made if missing.
            last_step: the last step that is done; 0 begins anew.
            tensorboard: folder of the events; None writes none.
            needed: names that every line has; one without them counts as torn.
            source: the file whose lines the run goes on from, if it is not `path`.

        Raises: ValueError if TensorBoard is asked for but not installed or `last_step` is below 0,
            OSError if `path` cannot be written.
        """
        if last_step < 0:
            raise ValueError(f"last_step is {last_step}; choose 0 or more")
        self.mistake: str | None = None
        """Why a line could not be written, the first time. No exception: the writer is one rank of
        many, and all of them must stop at the same place, which `check` is for."""
        self._path = path
        lines = _whole_lines(path if source is None else source, needed)
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines if line["step"] <= last_step)
        self._events = None if tensorboard is None else _event_writer(tensorboard, last_step)
        self._file = path.open("a", encoding="utf-8")

    @property
    def history(self) -> list[dict[str, Any]]:
        """All lines of the run so far, those before a resume included. Read anew: those of a long
        run are not kept in memory."""
        return read_metrics(self._path)

    def log(self, line: dict[str, Any]) -> None:
        """Write one step's `line`, which has a `step`.

        Values are numbers, or dictionaries of such; one that is not finite becomes null in the
        file, and is shown as it is by TensorBoard.
        """
        try:
            self._file.write(json.dumps(finite(line)) + "\n")
            self._file.flush()
        except OSError as error:
            self.mistake = self.mistake or (
                f"{self._path} cannot be written ({error.strerror}); free some space there, or "
                "choose another --out"
            )
        self._show(line)

    def _show(self, line: dict[str, Any]) -> None:
        if self._events is not None:
            for name, value in _flat(line):
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, line["step"])

    def check(self) -> None:
        """Raise OSError if a line could not be written."""
        if self.mistake is not None:
            raise OSError(self.mistake)

    def sync(self) -> None:
        """Put the lines on disk. Raises OSError if one of them could not be written."""
        self.check()
        os.fsync(self._file.fileno())

    def moved(self, path: Path, tensorboard: Path | None = None, last_step: int = 0) -> None:
        """Note that the file has the name `path` now. From now on TensorBoard's events go to
        `tensorboard`, those of the lines after `last_step` first."""
        self._path = path
        if tensorboard is not None:
            self._events = _event_writer(tensorboard, last_step)
            for line in _whole_lines(path, ()):
                if line["step"] > last_step:
                    self._show(line)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:
            if self.mistake is None:
                raise
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
    return [*_whole_lines(path, needed)]


def _whole_lines(path: Path, needed: Collection[str]) -> Iterator[dict[str, Any]]:
    """One after the other: the file of a long run is large."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text, object_pairs_hook=_with_shared_names)
            except (ValueError, RecursionError):
                continue
            if _is_whole(line, needed):
                yield line


def _with_shared_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary whose names, the same in most lines, are in memory once."""
    return {sys.intern(name): value for name, value in pairs}


def _is_whole(line: Any, needed: Collection[str]) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("step"), int)
        and line.keys() >= set(needed)
        and all(value is None or isinstance(value, (int, float)) for _, value in _flat(line))
    )


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
