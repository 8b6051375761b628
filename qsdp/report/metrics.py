"""metrics.jsonl: one JSON object a step, whatever crashes in between."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from qsdp.common.atomic_files import replacing
from qsdp.common.json_files import json_value
from qsdp.common.printing import print_error
from qsdp.common.user_errors import quoted
from qsdp.report.appended_lines import AppendedLines
from qsdp.report.step_line import StepLine

_MAY_BE_NULL = {"loss", "grad_norm"}
_MOST = 1e300  # beyond what is ever measured: sums stay finite


class MetricsWriter:
    """Appends lines to ``path`` and, if asked, TensorBoard events to a folder.

    A run that goes on after ``last_step`` drops the lines of later steps first, so that each step
    has one line; a line that a crash tore is dropped as well.
    """

    def __init__(
        self,
        path: Path,
        last_step: int = 0,
        tensorboard: Path | None = None,
        needed: Collection[str] = (),
        source: Path | None = None,
        may_appear: Callable[[], None] | None = None,
    ) -> None:
        """Open the file.

        Args:
            path: The file, made if missing.
            last_step: The last step that is done; 0 begins anew.
            tensorboard: Folder of the events; None writes none.
            needed: Names of the numbers that every line has, null for a loss or a norm that was not
                finite; one without them counts as torn.
            source: The file whose lines the run goes on from, if it is not ``path``.
            may_appear: Raises ValueError if a file that is gone is not to be made again.

        Raises:
            ValueError: TensorBoard is asked for but not installed, or ``last_step`` is below 0.
            OSError: ``path`` cannot be written.
        """
        if last_step < 0:
            raise ValueError(f"last_step is {last_step}: choose 0 or more.")
        lines = _whole_lines(path if source is None else source, needed)
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines if line["step"] <= last_step)
        self._events = None if tensorboard is None else _event_writer(tensorboard, last_step)
        self._lines = AppendedLines(path, may_appear)
        self._needed = needed

    @property
    def history(self) -> list[StepLine]:
        """All lines of the run so far, those before a resume and those that wait included.

        They are read anew: those of a long run are not kept in memory.
        """
        kept = [json.loads(line, object_pairs_hook=_with_shared_names) for line in self._lines.kept]
        first = kept[0]["step"] if kept else math.inf
        found = []
        try:
            for line in _whole_lines(self._lines.path, self._needed):
                if line["step"] < first:
                    found.append(line)
        except OSError as error:
            print_error(f"warning: {self._lines.path} cannot be read ({error.strerror or error}).")
        return found + kept

    def log(self, line: Mapping[str, Any]) -> None:
        """Write one step's ``line``, which has a ``step``; a later one of that step wins.

        The file has both, and readers here take the later one. What cannot be written ends nothing:
        lines wait for room, and events stop. Values are numbers, or dictionaries of such; one that
        is not finite becomes null in the file, and is shown as it is by TensorBoard.
        """
        self._lines.append(json.dumps(json_value(line)))
        with self._events_may_fail():
            self._show(line)

    def _show(self, line: Mapping[str, Any]) -> None:
        if self._events is not None:
            for name, value in _flat(line):
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, line["step"])

    @contextlib.contextmanager
    def _events_may_fail(self) -> Iterator[None]:
        """Inside, errors of TensorBoard, of any kind, end its events and nothing else.

        It writes in a thread, whose errors come out at a later call. It is not even closed after
        one: that could wait for the thread.
        """
        try:
            yield
        except Exception as error:
            self._events = None
            print_error(
                f"warning: TensorBoard's events cannot be written ({quoted(error)}), and the run "
                "goes on without them."
            )

    def sync(self) -> None:
        """Put the lines on disk, if that can be done now."""
        self._lines.sync()

    def moved(self, path: Path, tensorboard: Path | None = None, last_step: int = 0) -> None:
        """Note that the file has the name ``path`` now.

        From now on TensorBoard's events go to ``tensorboard``, those of the lines after
        ``last_step`` first.
        """
        self._lines.path = path
        if tensorboard is not None:
            with self._events_may_fail():
                self._events = _event_writer(tensorboard, last_step)
                for line in self.history:
                    if line["step"] > last_step:
                        self._show(line)

    def close(self) -> None:
        """Write what waits, if that can be done now, and close the file and the events."""
        self._lines.close()
        with self._events_may_fail():
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


def read_metrics(path: Path, needed: Collection[str] = ()) -> list[StepLine]:
    """The whole lines of a metrics.jsonl, with numbers only and all of the ``needed`` ones."""
    return [*_whole_lines(path, needed)]


def _whole_lines(path: Path, needed: Collection[str]) -> Iterator[StepLine]:
    """The lines, one after the other: a long run's file is large. Of two of one step the later."""
    if not path.exists():
        return
    before = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text, object_pairs_hook=_with_shared_names)
            except (ValueError, RecursionError):
                continue
            if not _is_whole(line, needed):
                continue
            if before is not None and before["step"] != line["step"]:
                yield before
            before = line
    if before is not None:
        yield before


def _with_shared_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary whose names, the same in most lines, are in memory once."""
    return {sys.intern(name): value for name, value in pairs}


def _is_whole(line: Any, needed: Collection[str]) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("step"), int)
        and all(value is None or _is_number(value) for _, value in _flat(line))
        and all(
            _is_number(line.get(name)) or (name in _MAY_BE_NULL and line.get(name, 0) is None)
            for name in needed
        )
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_MOST <= value <= _MOST


def _flat(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
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
            "--tensorboard needs the tensorboard package: run 'pip install tensorboard', or leave "
            "the flag out."
        ) from None
    except Exception as error:  # of a package beside it, of another version
        raise ValueError(
            "--tensorboard needs the tensorboard package, which cannot be loaded "
            f"({quoted(error)}): install it anew, or leave the flag out."
        ) from None
    return SummaryWriter(str(folder), purge_step=last_step + 1)
