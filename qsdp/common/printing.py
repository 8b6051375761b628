"""What a run prints, where printing may fail: a log on a full disk, a reader that has gone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Inside, nothing that is printed can fail: what cannot be written is dropped.

    A reader that has gone, as ``head`` does, is not waited for: whatever is printed later, by this
    process or by what it starts, goes nowhere. A stream that is not there is one into nowhere.
    """
    before = {"stdout": sys.stdout, "stderr": sys.stderr}
    with contextlib.ExitStack() as opened:
        own: dict[str, Any] = {}
        for name, stream in before.items():
            if stream is None:  # as Python has it where it was closed when the process began
                stream = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
            own[name] = _forgiving(stream)
        sys.stdout, sys.stderr = own["stdout"], own["stderr"]
        try:
            yield
        finally:
            for name, stream in before.items():
                if getattr(sys, name) is own[name]:  # else whoever put another there takes it away
                    setattr(sys, name, stream)


def is_rank_0() -> bool:
    """Whether this process is the one that speaks for all: rank 0, or one without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def print_error(text: str) -> None:
    """Print one line on standard error, if that can be written.

    In one write: torchrun starts Python unbuffered, and what it says itself would come in between.
    """
    if sys.stderr is not None:
        print(f"{printable(text)}\n", end="", file=_forgiving(sys.stderr), flush=True)


def printable(text: str) -> str:
    """``text`` as a terminal shows it: files of others may hold what would steer one."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def flush_output() -> None:
    """Write what was printed and is still in memory, as far as it can be written.

    The rest goes nowhere: it would fail again when Python ends, with another exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        own = stream._stream if isinstance(stream, _Forgiving) else stream
        if own is not None:
            try:
                own.flush()
            except (OSError, ValueError):
                _send_nowhere(own)


class _Forgiving:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``, if that can be done; what the encoding lacks is escaped."""
        try:
            self._try(lambda: self._stream.write(text))
        except UnicodeEncodeError as error:
            printable = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            self._try(lambda: self._stream.write(printable))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write all ``lines``, as ``write`` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream, if that can be done."""
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BrokenPipeError:
            # What is left in memory would fail again, at the latest when Python ends.
            _send_nowhere(self._stream)
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError):  # ValueError: it is closed
            return


def _send_nowhere(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def _forgiving(stream: TextIO) -> Any:
    return stream if isinstance(stream, _Forgiving) else _Forgiving(stream)
