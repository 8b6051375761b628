"""How a run ends before its time, in one sentence.

A user's mistake: exit status 2 on every rank, said by rank 0. A rank that has ended or hangs: exit
status 1 on every other, said by each of them, since nobody knows who else is left to say it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from qsdp.common.streams import bring_out, complain
from qsdp.train.signals import were_heeded

EXIT_STATUS = 2
LOST_STATUS = 1
_PATIENCE_S = 10.0
_SHORT_PATIENCE_S = 1.0


class UserError(Exception):
    """A mistake that its message, one sentence, lets the user correct."""

    def __init__(self, message: str, *, is_shared: bool = False) -> None:
        """`is_shared`: every rank raises this error, so rank 0 will print it."""
        super().__init__(message)
        self.is_shared = is_shared


def sentence(error: BaseException) -> str:
    """The message of `error` on one line; of an OSError, what failed on which file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


def is_lost(error: BaseException) -> bool:
    """Whether `error` comes from a rank that has ended or does not answer."""
    if "torch" not in sys.modules:
        return False
    from qsdp.common.failures import is_failure  # loads torch

    return is_failure(error)


def leave_lost(error: BaseException) -> NoReturn:
    """End this rank at once, with exit status 1, since another one is lost.

    The launcher is about to end this process too, and tearing down collectives that have failed may
    hang.
    """
    from qsdp.common.failures import root

    complain(f"error on rank {os.environ.get('RANK', '0')}: {root(error)}")
    bring_out()
    os._exit(LOST_STATUS)


def leave(error: UserError) -> NoReturn:
    """End this rank with exit status 2, after rank 0 has had the time to say why.

    A launcher that sees one rank fail ends the others at once. So the others hold still, up to 10
    seconds, and leave with the same status when the launcher's SIGTERM comes. If it does not come,
    the mistake may be this rank's alone (a file that one node lacks), and it speaks for itself.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        complain(f"error: {sentence(error)}")
        raise SystemExit(EXIT_STATUS)
    signal.signal(signal.SIGTERM, _leave_now)
    if were_heeded():  # the launcher's signal came too early for this handler, and no other will
        time.sleep(min(_PATIENCE_S, _SHORT_PATIENCE_S))
        raise SystemExit(EXIT_STATUS)
    time.sleep(_PATIENCE_S)
    if not error.is_shared:
        complain(f"error on rank {rank}: {sentence(error)}")
    raise SystemExit(EXIT_STATUS)


def _leave_now(signum: int, frame: FrameType | None) -> NoReturn:
    os._exit(EXIT_STATUS)
