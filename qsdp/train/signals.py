"""A scheduler's signals: a run that is told to end finishes its step, saves, and ends with 0.

SIGTERM and SIGUSR1 only set a flag here. ``World`` lets it ride on what all ranks exchange anyway,
so that all of them know at the same place, whichever of them was told.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """All ranks know that a run is to end: what it was about to do is left."""


@dataclass
class Stop:
    """Whether a run is to end before its time."""

    asked: signal.Signals | None = None
    """The first signal that this process got."""
    is_agreed: bool = False
    """Whether all ranks know that one of them was asked: the same on all ranks."""

    @property
    def why(self) -> str:
        """What came, in words."""
        return "a signal to another rank" if self.asked is None else self.asked.name

    def check(self) -> None:
        """Raise StopRequested, on all ranks alike, if all of them know that the run is to end."""
        if self.is_agreed:
            raise StopRequested


_latest = Stop()
_process_ends = False


@contextmanager
def process_ends() -> Iterator[None]:
    """Inside, what follows ``handling_signals`` only ends the process.

    One that was told ignores what comes then, which would end it with another status.
    """
    global _process_ends
    _process_ends = True
    try:
        yield
    finally:
        _process_ends = False


@contextmanager
def handling_signals(stop: Stop | None = None) -> Iterator[Stop]:
    """Inside, ``SIGNALS`` to this process set ``stop.asked``, however often they come.

    A thread other than the main one may not handle signals: they are left as they are.
    """
    global _latest
    _latest = stop = stop or Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        stop.asked = stop.asked or signal.Signals(signum)

    former = {number: signal.signal(number, ask) for number in SIGNALS}
    for number in SIGNALS:
        signal.siginterrupt(number, False)  # what other threads wait for in C goes on
    try:
        yield stop
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # none comes after the look at what was asked
        if not (_process_ends and stop.asked):
            for number, handler in former.items():
                # None: a handler that Python does not know and cannot put back.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def stop_was_requested() -> bool:
    """Whether this process was told to end in the latest ``handling_signals``.

    Nobody will tell it again.
    """
    return _latest.asked is not None
