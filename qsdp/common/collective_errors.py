"""What a collective says when it fails: its name, its step and its rank, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from qsdp.common.user_errors import group_for_user, quoted, sentence

_LONGEST = 240
_OF_THE_NETWORK = re.compile(
    r"time-?out|timed out|connect|\bpeer\b|socket|\bstore\b", re.IGNORECASE
)


class CollectiveError(RuntimeError):
    """A collective of torch.distributed failed: a rank has ended, or does not answer in time."""


@contextmanager
def collective(what: str, names: Sequence[str] = (), step: int | None = None) -> Iterator[None]:
    """Inside, an error of torch.distributed becomes a CollectiveError that says what failed.

    On CPUs the end of another rank is noticed at once, and one that hangs after the process group's
    timeout. NCCL works behind the host's back: there its watchdog ends the process instead. Errors
    that are this rank's own (its memory is full, a tensor may not be written) pass as they are.

    Args:
        what: The collective, ``gather`` for instance.
        names: The parameters of the group that it is for.
        step: The step of the keys' clock.
    """
    try:
        yield
    except CollectiveError:
        raise
    except RuntimeError as error:
        if not (_is_failed_collective(error) or _OF_THE_NETWORK.search(str(error))):
            raise
        of = f" of the group of {group_for_user(names)}" if names else ""
        at = "" if step is None else f" at step {step}"
        raise CollectiveError(
            f"the {what}{of}{at} failed on rank {dist.get_rank()}: {explain(error)}."
        ) from error


def explain(error: BaseException) -> str:
    """What it means that a collective failed with ``error``, on one line."""
    text = re.sub(r"^\[\S+:\d+\] ", "", sentence(error))  # the place in gloo's sources
    return f"a rank has ended or does not answer ({quoted(text, _LONGEST)})"


def is_failure(error: BaseException) -> bool:
    """Whether what failed in the first place is a collective, of qsdp or of anyone else."""
    return any(map(_is_failed_collective, _chain(error)))


def root(error: BaseException) -> str:
    """The sentence of the collective that failed in the first place."""
    failed = [each for each in _chain(error) if _is_failed_collective(each)]
    named = [each for each in failed if isinstance(each, CollectiveError)]
    return str(named[-1]) if named else f"a collective failed: {explain(failed[-1])}."


def _is_failed_collective(error: BaseException) -> bool:
    # gloo's errors are plain RuntimeErrors: only the place in its sources tells them apart.
    return isinstance(error, CollectiveError | dist.DistError) or (
        isinstance(error, RuntimeError) and re.match(r"\[\S*gloo/\S+:\d+\]", str(error)) is not None
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what it comes from, except what was cut off by ``raise ... from None``."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
