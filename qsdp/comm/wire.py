"""What all groups of one handle share."""

from torch import Tensor

from qsdp.comm.clock import Clock
from qsdp.comm.levels import Counts, Levels
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

    @property
    def level_values(self) -> Tensor | None:
        """The learned levels, as the codec takes them."""
        return None if self.levels is None else self.levels.values

    @property
    def least_bits(self) -> int:
        """Bits that no value may fall short of in this step."""
        return self.config.warmup_bits if self.clock.step < self.config.warmup_steps else 0
