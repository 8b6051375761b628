"""How a run ends before its time, in one sentence.

A user's mistake: exit status 2 on every rank, said by rank 0. A rank that has ended or hangs: exit
status 1 on every other, said by each of them, since nobody knows who else is left to say it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from qsdp.common.printing import flush_output, forgiving_output, is_rank_0, print_error
from qsdp.common.user_errors import UserError, quoted
from qsdp.train.signals import process_ends, stop_was_requested

EXIT_STATUS = 2
LOST_STATUS = 1
_PATIENCE_S = 10.0
_SHORT_PATIENCE_S = 1.0


def is_lost(error: BaseException) -> bool:
    """Whether to exit at once: ``error`` comes from a rank that has ended or does not answer."""
    if "torch" not in sys.modules:
        return False
    from qsdp.common.collective_errors import is_failure  # loads torch

    return is_failure(error)


def leave_lost(error: BaseException) -> NoReturn:
    """End this rank at once, with exit status 1, since another one is lost.

    The launcher is about to end this process too, and tearing down collectives that have failed may
    hang.
    """
    from qsdp.common.collective_errors import root

    print_error(f"error on rank {os.environ.get('RANK', '0')}: {quoted(root(error))}.")
    flush_output()
    os._exit(LOST_STATUS)


def leave(error: UserError) -> NoReturn:
    """End this rank with exit status 2, after rank 0 has had the time to say why.

    A launcher that sees one rank fail ends the others at once. So the others hold still, up to 10
    seconds, and leave with the same status when the launcher's SIGTERM comes. If it does not come,
    the mistake may be this rank's alone (a file that one node lacks), and it speaks for itself.
    """
    if is_rank_0():
        print_error(f"error: {quoted(error)}.")
        raise SystemExit(EXIT_STATUS)
    signal.signal(signal.SIGTERM, _leave_now)
    # The launcher's signal may have come too early for this handler, and no other will come.
    if stop_was_requested():
        time.sleep(min(_PATIENCE_S, _SHORT_PATIENCE_S))
        raise SystemExit(EXIT_STATUS)
    time.sleep(_PATIENCE_S)
    if not error.is_shared:
        print_error(f"error on rank {os.environ['RANK']}: {quoted(error)}.")
    raise SystemExit(EXIT_STATUS)


def _leave_now(signum: int, frame: FrameType | None) -> NoReturn:
    os._exit(EXIT_STATUS)


_INTERRUPTED = 130  # as a shell reports SIGINT


@contextlib.contextmanager
def one_sentence_at_the_end(if_interrupted: str) -> Iterator[None]:
    """Inside, what ends a command before its time becomes one sentence and an exit status.

    What cannot be printed ends nothing.
    """
    try:
        with forgiving_output():
            yield
    except (UserError, RuntimeError) as error:
        if is_lost(error):
            leave_lost(error)
        if not isinstance(error, UserError):
            raise
        leave(error)
    except KeyboardInterrupt:
        if is_rank_0():
            print_error(f"interrupted, and {if_interrupted}.")
        raise SystemExit(_INTERRUPTED) from None


def end_process(status: int) -> NoReturn:
    """Exit with ``status``, all work being on disk, without tearing Python down.

    gloo's threads outlive their process group, and one that still drops its last tensor while
    Python is being finalized ends the process with SIGABRT ("terminate called without an active
    exception", torch 2.13): the launcher would report a failed run.
    """
    flush_output()
    os._exit(status)


def run(command: Callable[[], None]) -> NoReturn:
    """Run a command that may have opened a world, and end the process with its exit status."""
    status: object = 0
    try:
        with process_ends():
            command()
    except SystemExit as stop:
        status = stop.code
    if "torch" in sys.modules and (status is None or isinstance(status, int)):
        end_process(status or 0)
    flush_output()
    raise SystemExit(status)
