"""How far a run is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 10.0
_LARGE_BYTES = 16 << 20  # of a corpus: less is encoded in seconds


class RunProgress:
    """Shows loss, speed, bytes on the wire and the time left. Silent unless ``is_shown``."""

    def __init__(self, steps_done: int, steps: int, *, is_shown: bool) -> None:
        console = Console()
        self._steps_done, self._steps = steps_done, steps
        self._is_shown = is_shown
        self._is_bar = is_shown and console.is_terminal
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._is_bar,
        )
        self._task = self._bar.add_task("", total=steps, completed=steps_done)

    def show(self, line: Mapping[str, Any]) -> None:
        """Show one step's metrics, a ``StepLine``."""
        if not self._is_shown:
            return
        text = (
            f"loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tokens/s  "
            f"{format_bytes(line['wire_bytes_sent'])} sent"
        )
        if line.get("skipped_steps"):
            text += f"  {line['skipped_steps']} skipped"
        step = line["step"]
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        is_due = now - self._last_line >= _LINE_EVERY_S or step in (1, self._steps)
        if not self._is_bar and is_due:
            self._last_line = now
            left_s = (now - self._started) / (step - self._steps_done) * (self._steps - step)
            print(f"step {step}/{self._steps}  {text}  {format_time(left_s)} left", flush=True)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._is_shown:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()


@contextmanager
def encoding_bar(*, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told the bytes encoded and those of all, on a terminal, for a large corpus."""
    console = Console()
    columns = (TextColumn("encoding"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    is_bar = is_shown and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_bar) as bar:
        task = bar.add_task("", total=None, visible=False)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=total >= _LARGE_BYTES)

        yield show


def format_bytes(count: float) -> str:
    """Bytes as the progress shows them, ``1.2 MB``: three digits or so, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def format_time(seconds: float) -> str:
    """Seconds as the progress shows them, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
