"""How much of a model has been read, for a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

Progress = Callable[[int, int], None]
"""Called with the bytes read so far, and those to read in all."""


class CountedBytes:
    """Bytes read so far, of how many: those of files to verify, and further ones."""

    def __init__(self, progress: Progress, num_bytes: int, files: Iterable[Path] = ()) -> None:
        self._progress = progress
        self._done = 0
        sizes = (file.stat().st_size for file in files if file.is_file())
        self._total = num_bytes + sum(sizes)

    def add(self, num_bytes: int) -> None:
        """Note that ``num_bytes`` more have been read."""
        self._done += num_bytes
        self._progress(self._done, max(self._done, self._total))
