"""What all groups of one handle share."""

from collections.abc import Callable

import torch
from torch import Tensor

from qsdp.codec.payload import Field
from qsdp.comm.clock import Clock
from qsdp.comm.levels import Counts, Kind, Levels
from qsdp.comm.measure import Meter
from qsdp.comm.scratch import Scratch
from qsdp.comm.times import Times
from qsdp.comm.traffic import Traffic
from qsdp.config import QSDPConfig


class Wire:
    """The step of the keys, counters, buffers, and what holds for the moment."""

    def __init__(self, config: QSDPConfig, traffic: Traffic) -> None:
        self.config = config
        self.clock = Clock(config.seed)
        self.traffic = traffic
        self.times = Times()
        self.scratch = Scratch()
        self.is_exact = False
        self.meters: list[Meter | Counts] = []
        """What looks at the gradients that are sent."""
        self.levels: Levels | None = None
        self.support = 0
        """The number of the support that holds, 0 where all weights travel."""
        self._under_way: Callable[[], None] | None = None
        self._output: Tensor | None = None

    def leave_under_way(self, finish: Callable[[], None], output: Tensor) -> None:
        """Keep a collective's second half, which fills ``output``, for later: for `finish`, which
        comes before the next collective at the latest, so that the order of collectives stays the
        same on all ranks."""
        self.finish()
        self._under_way, self._output = finish, output

    def finish(self) -> None:
        """Finish what was left under way."""
        finish, self._under_way, self._output = self._under_way, None, None
        if finish is not None:
            finish()

    def abandon(self) -> None:
        """Finish what was left under way by a pass that nobody wants any more: with zeros in place
        of what it brings, since its gradients may have been set to zero meanwhile."""
        output = self._output
        self.finish()
        if output is not None:
            output.zero_()

    def observe(self, table: Tensor, flat: Tensor) -> None:
        """Let the meters look at the gradients of a flat slice that ``table`` describes."""
        raw = flat.view(torch.uint8)
        for row in table.tolist() if self.meters else ():
            start = row[Field.BUFFER_BYTE]
            end = start + row[Field.NUMEL] * flat.element_size()
            for meter in self.meters:
                meter.add_values(row, raw[start:end].view(flat.dtype), Kind.GRAD)

    @property
    def level_values(self) -> Tensor | None:
        """The learned levels, as the codec takes them."""
        return None if self.levels is None else self.levels.values

    @property
    def least_bits(self) -> int:
        """Bits that no value may fall short of in this step."""
        return self.config.least_warmup_bits if self.clock.step < self.config.warmup_steps else 0
