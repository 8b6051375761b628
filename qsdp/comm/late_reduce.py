"""Reduces that are left to the wire while the backward pass goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from qsdp.comm.differing_gradients import GradientsDiffer

MOST_UNDER_WAY = 2
"""Reduces that are left under way: each has buffers and a copy of this rank's own row."""


def exhaust(reducing: Generator[None, None, int]) -> int:
    """Go through all that is left of a reduce that may be late. Returns what it returns."""
    while True:
        try:
            next(reducing)
        except StopIteration as end:
            return int(end.value)


@dataclass(eq=False)
class LateReduce:
    """A late reduce: one under way, or of which this rank knows that ranks' gradients differ."""

    group: int
    """The plan's index."""
    output: Tensor
    """What the reduce fills: NaN until then."""
    refuse: Callable[[], None]
    """What to do at the end if ranks reduce different gradients."""
    reducing: Generator[None, None, int] | None = None
    """As ``reduce`` in ``comm/reduce_scatter.py`` makes it, late; None: nothing is under way."""
    slot: int = 0
    """The slot of its buffers."""
    divide: Callable[[Tensor], None] | None = None
    """Makes of the finished sum what FSDP2 would have made of it."""

    def finish(self) -> bool:
        """Fill the output. Returns False, and it stays NaN, where ranks reduce different ones."""
        assert self.reducing is not None
        assert self.divide is not None
        reducing, self.reducing = self.reducing, None
        try:
            exhaust(reducing)
        except GradientsDiffer:
            self.output.fill_(math.nan)
            return False
        self.divide(self.output)
        return True


class Late:
    """The late reduces that are under way, in the order in which they began. It holds no model.

    [Note: Late] A reduce returns as soon as the payloads of its last stage travel; earlier stages
    have faster links, and are waited for. It is finished before a third would be under way, before
    another one of its group begins, and at the end of the backward pass. To finish is to wait,
    decode and add: no matter of other ranks, so each may do so when it likes, also at once. Ranks
    that find out that they reduce different gradients, at whatever time, go on to the end of the
    backward pass, where all say so ([Note: Consensus] in ``comm/gradient_consensus.py``).
    """

    def __init__(self) -> None:
        self._reduces: list[LateReduce] = []

    def __bool__(self) -> bool:
        """Whether anything is under way, or is to be refused at the end."""
        return bool(self._reduces)

    @property
    def num_under_way(self) -> int:
        """How many reduces are under way."""
        return len(self._under_way())

    def make_room(self, group: int, *, adds: bool = False) -> int:
        """Make room for a reduce of ``group``, and return a free slot.

        What is under way of it is finished, and the first of too many.

        ``adds``: FSDP2 will add to gradients that are there, and any reduce may have to fill these:
        for tied parameters one of another group. So all are finished.
        """
        for late in self._under_way():
            if adds or late.group == group or self.num_under_way == MOST_UNDER_WAY:
                self._finish(late)
        taken = {late.slot for late in self._under_way()}
        return min(set(range(MOST_UNDER_WAY)) - taken)

    def leave(self, late: LateReduce, num_stages: int) -> None:
        """Let the stages of ``late`` start, and leave the last one under way."""
        assert late.reducing is not None
        for _ in range(num_stages):
            next(late.reducing)
        self.refuse_at_the_end(late)

    def refuse_at_the_end(self, late: LateReduce) -> None:
        """Let ``late`` wait for the end: of what is under way only if ranks turn out to differ."""
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
        """Finish all that a pass left behind and nobody wants any more.

        Zeros take the place of what it brings: its gradients may have been set to zero meanwhile.
        Errors are those of that pass; a rank that is lost is heard of at the next meeting.
        """
        left, self._reduces = self._reduces, []
        for late in left:
            if late.reducing is not None:
                with suppress(RuntimeError):
                    late.finish()
            late.output.zero_()

    def _under_way(self) -> list[LateReduce]:
        return [late for late in self._reduces if late.reducing is not None]

    def _finish(self, late: LateReduce) -> None:
        is_to_be_refused = False
        try:
            is_to_be_refused = not late.finish()
        finally:
            if not is_to_be_refused:
                self._reduces.remove(late)
