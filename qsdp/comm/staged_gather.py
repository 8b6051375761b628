"""An all-gather of parts of one size over the stages of a topology: [Note: Stages]."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qsdp.comm import transport
from qsdp.comm.buffers import BufferPool
from qsdp.comm.topology import StageGroup
from qsdp.comm.traffic import Traffic


class StagedGather:
    """The all-gather of all ranks' parts over the stages, from the outermost to the innermost.

    In each stage ranks hand on all that they have by then. ``own`` is where this rank's part is
    written before ``start``.

    Args:
        stages: Those of the plan.
        whole: uint8 [ranks * bytes of a part]: filled, in the order of ``gathered_ranks``.
        size: Bytes of a part.
        pool: Buffers for what is handed on.
    """

    def __init__(
        self, stages: Sequence[StageGroup], whole: Tensor, size: int, pool: BufferPool
    ) -> None:
        self._stages, self._whole, self._size, self._pool = stages, whole, size, pool
        group = stages[-1].group
        self._gathered = self._room(group.size() * size)
        self.own = self._gathered.narrow(0, group.rank() * size, size)

    def start(self, *, async_op: bool = False) -> None:
        """Start the first stage. ``async_op``: it runs beside this thread until ``wait``."""
        group = self._stages[-1].group
        self._arrival = transport.start_all_gather(
            self._gathered, self.own, group, async_op=async_op
        )

    def wait(self) -> Tensor | None:
        """Go through all stages; returns the whole where the host can read it at once."""
        seen = self._arrival.wait()
        for stage in reversed(self._stages[:-1]):
            handed_on = self._gathered
            self._gathered = self._room(stage.size * handed_on.numel())
            seen = transport.start_all_gather(self._gathered, handed_on, stage.group).wait()
            self._pool.release(handed_on)
        return seen

    def count(self, traffic: Traffic, *, is_training: bool = False) -> None:
        """Tell ``traffic`` of the bytes that this rank has sent."""
        size = self._size
        for stage in reversed(self._stages):
            traffic.gathered("gather", stage.group, size, is_training=is_training)
            size *= stage.size

    def _room(self, num_bytes: int) -> Tensor:
        """Room for the parts of one stage: the last one fills the whole."""
        if num_bytes == self._whole.numel():
            return self._whole
        return self._pool.acquire(num_bytes, self._whole.device)
