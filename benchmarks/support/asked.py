"""What a comparison is asked for: refused in one sentence where it cannot be."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from benchmarks.support.contestants import chosen, contestants
from benchmarks.support.race import LOOPBACK, device_of
from benchmarks.support.runs import Mistake
from qsdp.common.flags import flag
from qsdp.common.folder_locks import unlocked_folder


def check_least(arguments: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Raise Mistake for the first option, by its name in ``arguments``, below its least value."""
    for name, limit in least.items():
        value = getattr(arguments, name)
        if value < limit:
            raise Mistake(f"{flag(name)} is {value}: give at least {limit}.")


def check_each_least(flag: str, values: Sequence[float], limit: float) -> None:
    """Raise Mistake for the first of an option's values that is below its least one."""
    for value in values:
        if not limit <= value < math.inf:
            raise Mistake(f"{flag} has {value}: give numbers of at least {limit}.")


def check_whole_sequences(arguments: argparse.Namespace, contexts: Mapping[str, int]) -> None:
    """Raise Mistake for an option of tokens that is no multiple of a sequence's."""
    for name, context in contexts.items():
        value = getattr(arguments, name)
        if value % context:
            raise Mistake(
                f"{flag(name)} is {value}: give a multiple of {context}, the tokens of a sequence."
            )


def check_shared(arguments: argparse.Namespace) -> None:
    """Raise Mistake for what no comparison can be: see contestants.add_arguments."""
    least = {"rounds": 1, "warmup": 0, "settle": 0, "groups": 0, "threads": 1, "context": 1}
    least |= {"powersgd_rank": 1, "vocab_size": 1, "tokens": arguments.context}
    check_least(arguments, least)
    check_whole_sequences(arguments, {"tokens": arguments.context})


def check_hosts(arguments: argparse.Namespace) -> None:
    """Raise Mistake for a number of hosts or of ranks on one that cannot be."""
    for name in ("hosts", "nproc_per_node"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= 250:
            raise Mistake(f"{flag(name)} is {value}: give 1 to 250.")


def check_rate(flag: str, rate: str | None) -> None:
    """Raise Mistake for a rate that neither is tc's, nor loopback."""
    if rate not in (None, LOOPBACK) and not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?[kmgt]?bit", rate):
        raise Mistake(
            f"{flag} is {rate!r}: give a rate as tc writes it, for instance 100mbit or 1gbit, or "
            "loopback."
        )


def decide(arguments: argparse.Namespace) -> None:
    """Set the device, and leave out what is not installed. Raises Mistake if nobody is left."""
    arguments.device = device_of(arguments)
    if find_spec("deepspeed") is None:
        arguments.without = [*arguments.without, "zero3-*"]
        print("DeepSpeed is not installed: pip install 'qsdp[deepspeed]' for its rows")
    if not chosen(arguments):
        names = ", ".join(one.name for one in contestants())
        raise Mistake(f"--contestants and --without leave none of {names}: leave some in.")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Inside, the folder ``out``, which is made, is this comparison's alone.

    Raises Mistake if it cannot be.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(
            f"--out is {out}, which cannot be made ({error.strerror}): give a folder where you may "
            "write."
        ) from None
    with unlocked_folder(out) as is_ours:
        if not is_ours:
            raise Mistake(f"--out is {out}, where another comparison runs: wait, or give another.")
        yield
