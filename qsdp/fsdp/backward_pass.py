"""Whether a backward pass is under way, was cut short, and what is done where it ends."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

from qsdp.comm.late_reduce import Late
from qsdp.compat.autograd import after_backward, backward_number


class BackwardPass:
    """The backward pass through a model, one after the other. It holds no model.

    ``is_under_way`` says whether one has begun and not ended, or was cut short.

    Args:
        late: The reduces that are under way, which are finished, or refused, where it ends. If that
            raises, the pass counts as cut short.
        at_end: Called when it has ended.
    """

    def __init__(self, late: Late, at_end: Callable[[], None]) -> None:
        self._late, self._at_end = late, at_end
        self.is_under_way = False
        self._ends_late = False
        self._number = -1
        self._running: Callable[[], _End | None] = lambda: None

    @property
    def was_cut_short(self) -> bool:
        """Whether the pass that began last is gone without having ended.

        To be asked inside a backward pass: outside, any that is under way was.
        """
        return self.is_under_way and self._running() is None

    def begin(self) -> None:
        """Take the backward pass that this thread is in for one that begins."""
        self.is_under_way, self._ends_late = True, False
        self._number = backward_number()
        # autograd alone holds it, until its pass has ended, or was cut short. No frame that lives
        # on may: a traceback of what follows would hold it.
        end = _End(self)
        self._running = weakref.ref(end)
        after_backward(end)

    def end(self) -> None:
        """Take the backward pass for ended."""
        self.is_under_way = False
        self._at_end()

    def end_late(self) -> None:
        """Let what is left under way be finished, or refused, when the backward pass ends.

        That is in one place on all ranks, also on those that have left nothing.
        """
        is_whole = backward_number() == self._number  # not one inside, which recomputes
        self._ends_late |= is_whole
        after_backward(partial(self._end_what_is_late, is_whole))

    def _end_what_is_late(self, is_whole: bool) -> None:
        self._late.end()
        if is_whole:
            self._ends_late = False
            self.end()


class _End:
    """What ends a backward pass; it is gone when the pass is, however that ended."""

    def __init__(self, backward: BackwardPass) -> None:
        self._backward = backward

    def __call__(self) -> None:
        if not self._backward._ends_late:  # else what does so comes later
            self._backward._end_what_is_late(True)
