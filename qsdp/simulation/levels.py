"""Learned levels of the simulated ranks: whose values are counted, and when levels change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qsdp.codec.levels import BINS, fit, histogram, uniform_levels
from qsdp.config import LEARNED_BITS, QSDPConfig

Place = tuple[str, bool, int]
"""Parameter, whether it is its gradient, bits."""


class Levels:
    """The levels of each parameter and direction, for the bits that they travel at.

    They are fitted before each of `QSDPConfig.level_steps`, to all ranks' weights of that moment
    and all gradients that were sent in the step before.

    Args:
        config: when, and bucket sizes.
        bits: of weights and of gradients after the warm-up, by parameter name.
    """

    def __init__(self, config: QSDPConfig, bits: Mapping[str, tuple[int, int]]) -> None:
        self._config = config
        self._values: dict[Place, Tensor] = {}
        local = config.local_grad_bits or 8
        self._counts = {
            (name, is_grad, b): torch.zeros(BINS, dtype=torch.int64)
            for name, (weight, grad) in bits.items()
            for is_grad, b in ((False, weight), (True, grad), (True, local))
            if b in LEARNED_BITS
        }

    def of(self, place: Place) -> Tensor | None:
        """fp32 [2**bits]; None stands for the uniform grid."""
        if self._config.levels == "uniform" or place[2] not in LEARNED_BITS:
            return None
        return self._values.get(place, uniform_levels(place[2]))

    def observe(self, place: Place, row: Tensor, step: int) -> None:
        """Count a gradient that is sent in ``step``."""
        if step + 1 in self._config.level_steps:
            self._count(place, row)

    def learn(self, step: int, weights: Mapping[str, Sequence[Tensor]]) -> None:
        """Fit levels if it is time before ``step``. ``weights`` are the shards of all ranks, of
        every replica, as they are gathered."""
        if self._config.levels == "uniform" or step not in self._config.level_steps:
            return
        for place, counts in self._counts.items():
            name, is_grad, bits = place
            for shard in () if is_grad else weights[name]:
                self._count(place, shard)
            self._values[place] = fit(self._values.get(place, uniform_levels(bits)), counts)
            counts.zero_()

    def _count(self, place: Place, values: Tensor) -> None:
        if self._config.levels == "learned" and place in self._counts:
            bucket = self._config.bucket_of(place[2], is_grad=place[1])
            histogram(values.reshape(-1), bucket, self._counts[place])
