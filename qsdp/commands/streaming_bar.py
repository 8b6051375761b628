"""What commands share that read a model tensor by tensor, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qsdp.commands.parsing import check_one_process
from qsdp.common.user_errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

GIB = 1 << 30


def check_streaming(max_file_gib: float) -> None:
    """Raise UserError for files of no size, and in one process of several."""
    if not 1 / GIB <= max_file_gib < 1 << 20:
        raise UserError(f"--max-file-gib is {max_file_gib}: choose a number of GiB, such as 2.")
    check_one_process()


@contextmanager
def streaming_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar, where ``console`` is a terminal, that is told the bytes read and those to read."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
