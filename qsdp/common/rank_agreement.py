"""[Note: Meeting] Ranks meet before a collective that one of them might enter alone.

A collective that some ranks do not enter, or enter with other sizes, ends a rank by a signal (gloo)
or hangs them all (NCCL). So every call of qsdp that leads to collectives opens with the same eight
bytes a rank: a digest of which call it is, and of all that its collectives depend on. Where these
differ, ranks exchange the words behind them, and every rank raises the same sentence.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.common.collective_errors import CollectiveError, collective
from qsdp.common.user_errors import names_for_user, quoted
from qsdp.compat.process_groups import control_device
from qsdp.compat.torch_collectives import all_gather_single


def meet(
    call: str,
    facts: Mapping[str, object],
    groups: Sequence[dist.ProcessGroup],
    *,
    has_news: bool = False,
    is_read: bool = True,
) -> bool:
    """Make sure that the ranks of ``groups`` agree: all are at ``call`` with the same ``facts``.

    A collective; with several groups, the axes of a mesh, all ranks of the mesh hear of each other.

    Args:
        call: What this is, in words that go on after "is at".
        facts: By what they are called, of plain types, so that what is equal has the same ``repr``.
        groups: Process groups whose ranks all call this.
        has_news: Whether this rank knows what it alone may know, and all shall hear of.
        is_read: False leaves the digests unread where that would stop a GPU's stream.

    Returns:
        Whether any rank has news.

    Raises:
        RuntimeError: On every rank, where ranks differ.
    """
    return Meeting(call, facts, groups, has_news=has_news, is_read=is_read).end()


def compare(call: str, facts: object, groups: Sequence[dist.ProcessGroup]) -> dict[int, Any] | None:
    """What each global rank calls its ``facts``, or None if these are equal on all: see ``meet``.

    Raises RuntimeError, on every rank, where another rank is at another call.
    """
    return Meeting(call, facts, groups).compare()[0]


@contextmanager
def mistakes_shared(call: str, groups: Sequence[dist.ProcessGroup]) -> Iterator[None]:
    """Inside, a mistake of this rank alone ends the agreement of the other ranks too.

    It reaches their next meeting at ``call``, which would wait for this rank in vain.
    """
    try:
        yield
    except CollectiveError:  # nobody would answer
        raise
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        compare(call, {"mistake": quoted(error)}, groups)
        raise


def warn(text: str) -> None:
    """Give a UserWarning that all ranks agree on: all call this, and the first one shows it.

    Where warnings are errors, all raise.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(text, stacklevel=2)
        return
    for action, message, category, *_ in warnings.filters:
        if issubclass(UserWarning, category) and (message is None or re.match(message, text)):
            if action == "error":
                raise UserWarning(text)
            return


class FactsDiffer(RuntimeError):
    """Ranks met at one call and did not agree: all of them know the facts of all.

    ``found`` are these by global rank.
    """

    def __init__(self, told: str, found: Mapping[int, Mapping[str, object]]) -> None:
        super().__init__(told)
        self.found = found

    def is_about(self, name: str) -> bool:
        """Whether ranks differ in the fact ``name``, or some have told the others that they do."""
        facts = self.found.values()
        if mistakes := [str(each["mistake"]) for each in facts if "mistake" in each]:
            return any(name in mistake for mistake in mistakes)
        return len({repr(each.get(name)) for each in facts}) > 1


class Meeting:
    """An agreement of ranks that has begun: other work, except collectives, may go on beside it.

    The arguments are those of ``meet``.
    """

    def __init__(
        self,
        call: str,
        facts: object,
        groups: Sequence[dist.ProcessGroup],
        *,
        has_news: bool = False,
        is_read: bool = True,
    ) -> None:
        self._call, self._facts, self._groups = call, facts, groups
        self._news, self._is_read = has_news, is_read
        self._digest = _digest((call, facts))
        self._sent: tuple[Tensor, dist.Work | None] | None = None
        if groups:
            self._send(groups[0])

    def end(self) -> bool:
        """Wait for all ranks. Returns whether any has news; raises as ``meet`` does."""
        found, news = self.compare()
        if found is not None:
            raise FactsDiffer(_difference(self._call, found), found)
        return news

    def compare(self) -> tuple[dict[int, Any] | None, bool]:
        """End as ``end`` does, but return the facts by global rank where these differ."""
        differs = False
        for group in self._groups:
            words = self._receive(group)
            if words is None:
                continue
            self._news = any(word & 1 for word in words)
            if len({word >> 1 for word in words}) > 1:
                differs = True
                # Ranks at other calls may know of other groups: nobody would meet this one there.
                _check_calls(self._call, self._facts, group)
                # What one axis of the mesh saw, the next one must know, or some would go on.
                self._digest = _digest(words)
        if not differs:
            return None, self._news
        found = {dist.get_rank(): self._facts}
        for group in self._groups:
            parts: list[dict[int, Any]] = [{} for _ in range(group.size())]
            with collective(f"agreement at {self._call}"):
                dist.all_gather_object(parts, found, group=group)
            found = {rank: each for part in parts for rank, each in part.items()}
        return dict(sorted(found.items())), self._news

    def _send(self, group: dist.ProcessGroup) -> None:
        word, device = 2 * self._digest + self._news, control_device(group)
        own = torch.full((1,), word, dtype=torch.int64, device=device)  # needs no copy to a GPU
        everyone = own.new_empty(group.size())
        with collective(f"agreement at {self._call}"):
            self._sent = everyone, all_gather_single(everyone, own, group, async_op=True)

    def _receive(self, group: dist.ProcessGroup) -> list[int] | None:
        """All ranks' words; None where nobody reads them."""
        if self._sent is None:
            self._send(group)
        assert self._sent is not None
        (everyone, work), self._sent = self._sent, None
        with collective(f"agreement at {self._call}"):
            if work is not None:
                work.wait()
            if not self._is_read and everyone.device.type != "cpu":
                return None
            return everyone.tolist()


def _check_calls(call: str, facts: object, group: dist.ProcessGroup) -> None:
    mine = (call, facts.get("mistake") if isinstance(facts, Mapping) else None)
    everyone = [mine] * group.size()
    with collective(f"agreement at {call}"):
        dist.all_gather_object(everyone, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    if len({each for each, _ in everyone}) == 1:
        return
    for rank, (_, mistake) in zip(ranks, everyone, strict=True):
        if mistake is not None:
            raise RuntimeError(f"rank {rank} cannot do what the others do at {call}: {mistake}.")
    for rank, (other, _) in zip(ranks, everyone, strict=True):
        if other != everyone[0][0]:
            raise RuntimeError(
                f"rank {rank} is at {other} while rank {ranks[0]} is at {everyone[0][0]}: make the "
                "same calls on every rank, in the same order."
            )


def _difference(call: str, found: Mapping[int, Mapping[str, object]]) -> str:
    """One sentence on the first fact that differs."""
    for rank, facts in found.items():
        if "mistake" in facts:
            return f"rank {rank} cannot do what the others do at {call}: {facts['mistake']}."
    first, *others = found
    for rank in others:
        for name in {**found[first], **found[rank]}:
            one, other = found[rank].get(name), found[first].get(name)
            if one != other:
                return (
                    f"rank {rank} is at {call} with {name} {_told(one, other)}, but rank {first} "
                    f"with {_told(other, one)}: do the same on every rank."
                )
    raise AssertionError(f"ranks differ at {call} in nothing that can be told: {found}.")


def _told(value: object, other: object) -> str:
    """``value`` in words; of two lists of names, what only this one has."""
    if not (isinstance(value, tuple) and isinstance(other, tuple)):
        return str(value)
    own = [str(each) for each in value if each not in other]
    return names_for_user(own) if own else f"{len(value)} others" if value else "none"


def _digest(described: object) -> int:
    """62 bits: one more is for the news."""
    digest = blake2b(repr(described).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
