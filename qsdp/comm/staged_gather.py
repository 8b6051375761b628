"""An all-gather of parts of one size over the stages of a topology: [Note: Stages]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

from torch import Tensor

from qsdp.comm import transport
from qsdp.comm.group_plan import Plan
from qsdp.comm.topology import StageGroup
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import collective


class StagedGather:
    """The all-gather of all ranks' parts over the stages, from the outermost to the innermost.

    In each stage ranks hand on all that they have by then. ``own`` is where this rank's part is
    written before ``start``.

    Args:
        plan: How the group travels.
        stages: The stages, innermost first.
        whole: uint8 [ranks * bytes of a part]: filled, in the order of ``gathered_ranks``.
        wire: What the group shares with the others.
        is_training: As for ``Traffic.sent``.
    """

    def __init__(
        self,
        plan: Plan,
        stages: Sequence[StageGroup],
        whole: Tensor,
        wire: Wire,
        *,
        is_training: bool = False,
    ) -> None:
        self._plan, self._whole, self._wire, self._is_training = plan, whole, wire, is_training
        self._stages, self._step = stages, wire.clock.step
        self._size = whole.numel() // prod(stage.size for stage in stages)
        group = stages[-1].group
        self._gathered = self._room(group.size() * self._size)
        self.own = self._gathered.narrow(0, group.rank() * self._size, self._size)

    def start(self, *, async_op: bool = False) -> None:
        """Start the first stage. ``async_op``: it runs beside this thread until ``wait``."""
        group = self._stages[-1].group
        with self._on_the_wire():
            self._arrival = transport.start_all_gather(
                self._gathered, self.own, group, async_op=async_op
            )

    def wait(self) -> Tensor | None:
        """Go through all stages, and count them; returns the whole where the host can read it."""
        stages, size = self._stages, self._size
        with self._on_the_wire():
            seen = self._arrival.wait()
            for stage in reversed(stages[:-1]):
                handed_on = self._gathered
                self._gathered = self._room(stage.size * handed_on.numel())
                seen = transport.start_all_gather(self._gathered, handed_on, stage.group).wait()
                self._wire.buffers.release(handed_on)
        for stage in reversed(stages):
            self._wire.traffic.gathered("gather", stage.group, size, is_training=self._is_training)
            size *= stage.size
        return seen

    def _room(self, num_bytes: int) -> Tensor:
        """Room for the parts of one stage: the last one fills the whole."""
        if num_bytes == self._whole.numel():
            return self._whole
        return self._wire.buffers.acquire(num_bytes, self._whole.device)

    @contextmanager
    def _on_the_wire(self) -> Iterator[None]:
        with (
            collective("gather", self._plan.names, self._step),
            self._wire.times.measure("gather", "wire", self._whole.device),
        ):
            yield
