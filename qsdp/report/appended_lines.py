"""Lines that are appended to a file, and wait in memory while it cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from qsdp.common.atomic_files import replacing
from qsdp.common.printing import print_error
from qsdp.common.user_errors import quoted

_RETRY_S = 5.0
_MOST_BYTES = 1 << 25  # that wait
_KEPT_BYTES = 1 << 15  # that are in the file and not on disk yet


class AppendedLines:
    """Appends lines to a file whatever becomes of its disk: nothing here raises.

    A line that cannot be written (no room, EIO, a stale handle) waits in memory, and with it all
    later ones; the next attempt comes some seconds later. Then what was torn is cut off, and the
    lines follow in their order. So do those that ``sync`` could not put on disk: some file systems
    say only there that they had no room. Standard error says when it begins, when all is written
    again, and in the end what never was.

    ``sync`` and ``close`` look whether the file still has its name. If nothing has, the file is
    made again, with all that was in it; another file in its place is not touched, and lines wait.

    ``path`` is the file, under the name that it has now. ``kept`` are the last lines, those that
    wait among them, each with its end of line.
    """

    def __init__(self, path: Path, may_appear: Callable[[], None] | None = None) -> None:
        """Open the file ``path``. Raises OSError if it cannot be opened.

        ``may_appear`` raises ValueError if a file that is gone is not to be made again.
        """
        self.path = path
        self.kept: list[bytes] = []
        self._may_appear = may_appear
        self._file = path.open("a+b", buffering=0)
        status = os.fstat(self._file.fileno())
        self._number = status.st_ino
        self._size = status.st_size  # before the kept lines
        self._num_written = 0  # of the kept lines
        self._num_dropped = 0
        self._failure: Exception | None = None
        self._next_try = 0.0

    def append(self, text: str) -> None:
        """Add one line, without its end, now or when there is room."""
        self.kept.append(f"{text}\n".encode())
        if self._failure is None or time.monotonic() >= self._next_try:
            self._write()
        self._bound()

    def sync(self) -> None:
        """Put all lines on disk, if that can be done now."""
        self._look_for_name()
        self._write()
        if self._failure is None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self._num_written = 0
                self._fail(error)
            else:
                self._forget(len(self.kept))

    def close(self) -> None:
        """Write what waits, if that can be done now, and close the file."""
        self._look_for_name()
        self._write()
        with contextlib.suppress(OSError):
            self._file.close()
        lost = len(self.kept) - self._num_written + self._num_dropped
        gone = "" if self.path.exists() else ", and the file is gone with those before"
        if lost or gone:
            print_error(f"warning: {lost} lines of {self.path} were never written{gone}.")

    def _look_for_name(self) -> None:
        """See that the file is the one that has the name."""
        if self._failure is not None:
            return
        try:
            if not self.path.exists():
                self._make_again()
            if not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                raise self._replaced()
        except (OSError, ValueError) as error:
            self._num_written = 0
            self._fail(error)

    def _make_again(self) -> None:
        """Give what was in the file the name that it had."""
        if self._may_appear is not None:
            self._may_appear()
        self._file.seek(0)
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            shutil.copyfileobj(self._file, file)
        former, self._file = self._file, self.path.open("a+b", buffering=0)
        with contextlib.suppress(OSError):
            former.close()
        self._number = os.fstat(self._file.fileno()).st_ino
        print_error(f"warning: {self.path} was gone, and is there again with all its lines.")

    def _replaced(self) -> OSError:
        """The error of a file in its place, another run's perhaps."""
        return OSError(errno.ESTALE, "another file has taken its place", str(self.path))

    def _write(self) -> None:
        try:
            if self._failure is not None:
                self._open_again()
            for line in self.kept[self._num_written :]:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
                self._num_written += 1
        except (OSError, ValueError) as error:
            self._fail(error)
            return
        if self._failure is not None:
            self._failure = None
            but = f", but for {self._num_dropped} too many to keep" if self._num_dropped else ""
            print_error(f"{self.path} is written again, with all lines that waited{but}.")

    def _open_again(self) -> None:
        """Open the file of before, by its name, and cut off what was not written as a whole.

        The one that is open stays so until then: its number is no other file's, and its lines are
        there if the name is gone.
        """
        if not self.path.exists():
            self._make_again()
        elif self.path.stat().st_ino != self._number:
            raise self._replaced()
        else:
            former, self._file = self._file, self.path.open("a+b", buffering=0)
            with contextlib.suppress(OSError):
                former.close()
        whole = self._size + sum(map(len, self.kept[: self._num_written]))
        if os.fstat(self._file.fileno()).st_size > whole:
            os.ftruncate(self._file.fileno(), whole)

    def _fail(self, error: OSError | ValueError) -> None:
        self._next_try = time.monotonic() + _RETRY_S
        if self._failure is None:
            why = quoted(getattr(error, "strerror", None) or error)
            print_error(
                f"warning: {self.path} cannot be written ({why}), but the run goes "
                "on, and what belongs there waits in memory until there is room."
            )
        self._failure = error

    def _bound(self) -> None:
        """Forget lines that are written, or too many."""
        most = _KEPT_BYTES if self._failure is None else _MOST_BYTES
        num_bytes, count = sum(map(len, self.kept)), 0
        while num_bytes > most:
            num_bytes -= len(self.kept[count])
            count += 1
        self._num_dropped += max(0, count - self._num_written)
        self._forget(count)

    def _forget(self, count: int) -> None:
        """Keep the first lines no longer."""
        self._size += sum(map(len, self.kept[: min(count, self._num_written)]))
        self._num_written = max(0, self._num_written - count)
        del self.kept[:count]
