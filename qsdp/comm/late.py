"""Reduces that are left to the wire while the backward pass goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

MOST_UNDER_WAY = 2
"""Reduces: each has buffers and a copy of this rank's own row."""


class SetsDiffer(Exception):
    """Some ranks have the agreed gradients to reduce, and some have others: [Note: Consent]."""


def exhaust(reducing: Generator[None, None, int]) -> int:
    """Go through all that is left of a reduce. Returns what it returns."""
    while True:
        try:
            next(reducing)
        except StopIteration as end:
            return int(end.value)


@dataclass(eq=False)
class LateReduce:
    """A reduce under way."""

    group: int
    """The plan's index."""
    output: Tensor
    """What it fills: NaN until then."""
    refuse: Callable[[], None]
    """What to do at the end if ranks reduce different gradients."""
    reducing: Generator[None, None, int] | None = None
    """As `comm.reduce.reduce` makes it, late; None: ranks are known to differ."""
    num_hops: int = 0
    """How often ``reducing`` stops."""
    slot: int = 0
    """Of its buffers."""
    divide: Callable[[Tensor], None] | None = None
    """What makes of the finished sum what FSDP2 would have made of it."""

    def start_hops(self, num_hops: int) -> None:
        """Let so many more hops, of those that are left, start."""
        for _ in range(min(num_hops, self.num_hops)):
            assert self.reducing is not None
            next(self.reducing)
            self.num_hops -= 1

    def finish(self) -> None:
        """Fill the output. Raises SetsDiffer where ranks reduce different gradients."""
        assert self.reducing is not None
        assert self.divide is not None
        reducing, self.reducing, self.num_hops = self.reducing, None, 0
        exhaust(reducing)
        self.divide(self.output)


class Late:
    """What is under way, in the order in which it began. It holds no model.

    [Note: Late] A reduce returns as soon as its first payloads travel. It is finished before the
    second reduce after it, before another one of its group, and at the end of the backward pass.
    To finish is to wait, decode and add: no matter of other ranks, so each may do so when it likes,
    also at once. What is theirs too comes at places that all ranks have, in the same order on all:
    the second hop starts before whatever is qsdp's next collective, and ranks that find out that
    they reduce different gradients go on to the end of the backward pass, where all say so
    ([Note: Consent] in `comm/consent.py`).
    """

    def __init__(self) -> None:
        self._reduces: list[LateReduce] = []

    def __bool__(self) -> bool:
        """Whether anything is under way, or is to be refused at the end."""
        return bool(self._reduces)

    @property
    def num_under_way(self) -> int:
        return len(self._under_way())

    def start_hops(self) -> None:
        """To be called before every collective of a backward pass."""
        for late in self._reduces:
            late.start_hops(late.num_hops)

    def make_room(self, group: int) -> int:
        """To be called before a reduce of ``group``: finish what is under way of it, since FSDP2
        may add to what that fills, and the first of too many. Returns a free slot."""
        for late in self._under_way():
            if late.group == group or self.num_under_way == MOST_UNDER_WAY:
                self._finish(late)
        taken = {late.slot for late in self._under_way()}
        return min(set(range(MOST_UNDER_WAY)) - taken)

    def leave(self, late: LateReduce) -> None:
        """Start ``late``, and leave it under way."""
        late.start_hops(1)
        late.output.fill_(math.nan)
        self._reduces.append(late)

    def refuse_at_the_end(self, late: LateReduce) -> None:
        """Let ``late``, of which this rank knows by now that ranks differ, wait for the end."""
        late.output.fill_(math.nan)
        self._reduces.append(late)

    def end(self) -> None:
        """Finish all, at the end of a backward pass. Raises what was to be refused."""
        for late in self._under_way():
            self._finish(late)
        refused, self._reduces = self._reduces, []
        for late in refused:
            late.refuse()

    def abandon(self) -> None:
        """Finish all that a pass left behind which nobody wants any more, with zeros in place of
        what it brings: its gradients may have been set to zero meanwhile."""
        left, self._reduces = self._reduces, []
        for late in left:
            if late.reducing is not None:
                with suppress(SetsDiffer):
                    late.finish()
            late.output.zero_()

    def _under_way(self) -> list[LateReduce]:
        return [late for late in self._reduces if late.reducing is not None]

    def _finish(self, late: LateReduce) -> None:
        try:
            late.finish()
        except SetsDiffer:
            late.output.fill_(math.nan)
            return
        except BaseException:
            self._reduces.remove(late)
            raise
        self._reduces.remove(late)
