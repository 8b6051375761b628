"""What all groups of one handle share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qsdp.codec.segment_table import Field
from qsdp.comm.buffers import BufferPool
from qsdp.comm.key_clock import Clock
from qsdp.comm.late_reduce import Late
from qsdp.comm.learned_levels import LearnedLevels, LevelCounts, LevelKind
from qsdp.comm.phase_times import Times
from qsdp.comm.quantization_error import Meter
from qsdp.comm.traffic import Traffic
from qsdp.config import QSDPConfig


class KeptState(Protocol):
    """How the codes stand that all ranks keep of one group."""

    @property
    def state(self) -> tuple[object, ...]:
        """What is the same on all ranks as long as none has missed a frame."""

    @property
    def begun(self) -> int:
        """The step in which all grids were drawn the last time."""

    @property
    def is_cut_short(self) -> bool:
        """Whether this rank was interrupted while it applied frames."""


class Wire:
    """The state of the wire: step of the keys, counters, buffers, and what holds for the moment."""

    def __init__(self, config: QSDPConfig, traffic: Traffic) -> None:
        self.config = config
        self.clock = Clock(config.seed)
        self.traffic = traffic
        self.times = Times()
        self.buffers = BufferPool()
        self.is_exact = False
        self.is_aside = False
        """Whether weights are other ones for a while, so that kept codes stay as they are."""
        self.meters: list[Meter | LevelCounts] = []
        """What looks at the gradients that are sent."""
        self.levels: LearnedLevels | None = None
        self.support = 0
        """The number of the support that holds, 0 where all weights travel."""
        self.late = Late()
        if config.gather == "delta":
            traffic.changed(0, 0, is_training=True)  # there to be read before anything was sent
        self.kept: dict[int, KeptState] = {}
        """By group, how what all ranks keep of it stands: [Note: Kept]."""

    def observe(self, table: Tensor, flat: Tensor) -> None:
        """Let the meters look at the gradients of a flat slice that ``table`` describes."""
        raw = flat.view(torch.uint8)
        for row in table.tolist() if self.meters else ():
            start = row[Field.BUFFER_BYTE]
            end = start + row[Field.NUMEL] * flat.element_size()
            for meter in self.meters:
                meter.add_values(row, raw[start:end].view(flat.dtype), LevelKind.GRAD)

    @property
    def level_values(self) -> Tensor | None:
        """The learned levels, as the codec takes them."""
        return None if self.levels is None else self.levels.values

    def gathers(self, step: int) -> str:
        """How weights are gathered in ``step`` of the clock, as ``QSDPConfig.gather`` has it.

        Changes wait for the end of the warm-up, and of an aside: until then payloads travel, as
        with ``once``.
        """
        config = self.config
        is_put_off = self.is_aside or step < config.warmup_steps
        return "once" if config.gather == "delta" and is_put_off else config.gather

    @property
    def least_bits(self) -> int:
        """Bits that no value may fall short of in this step."""
        return self.config.least_warmup_bits if self.clock.step < self.config.warmup_steps else 0
