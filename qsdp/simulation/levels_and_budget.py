"""What the simulated ranks learn while they train: levels, and bits that follow a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qsdp.codec.level_fitting import BINS, fit_levels, level_histogram, uniform_levels
from qsdp.comm.bit_budget import Claim, allot, check_budget
from qsdp.config import CODED_BITS, QSDPConfig
from qsdp.simulation.ranks import SimulatedRanks

Place = tuple[str, bool, int]
"""Parameter, whether it is its gradient, bits."""
LevelPlace = tuple[str, str, int]
"""Parameter; ``weight``, ``grad``, or ``kept`` for weights under a mask; bits."""
Bits = Mapping[str, tuple[int, int]]
"""Bits of weights and of gradients, by parameter name."""


class SimulatedLevels:
    """The levels of each parameter's weights, kept weights and gradients, for the bits in use.

    They are fitted before each of ``QSDPConfig.level_steps``, to all ranks' weights as they would
    be sent at that moment, and all gradients that were sent in the step before.
    """

    def __init__(self, config: QSDPConfig) -> None:
        self._config = config
        self._values: dict[LevelPlace, Tensor] = {}
        self._counts: dict[LevelPlace, Tensor] = {}

    def of(self, place: LevelPlace) -> Tensor | None:
        """fp32 [2**bits]: the levels of ``place``; None stands for the uniform grid."""
        if not self._is_learned(place):
            return None
        return self._values.get(place, uniform_levels(place[2]))

    def watch(self, step: int, bits: Bits) -> None:
        """Count from now on if levels are learned after ``step``."""
        self._counts = {}
        if self._config.levels == "uniform" or step + 1 not in self._config.learning_steps:
            return
        local = self._config.local_grad_bits or 8
        places = [
            (name, kind, b)
            for name, (weight, grad) in bits.items()
            for kind, b in (("weight", weight), ("kept", weight), ("grad", grad), ("grad", local))
        ]
        self._counts = {
            place: torch.zeros(BINS, dtype=torch.int64)
            for place in places
            if self._is_learned(place)
        }

    def observe(self, place: LevelPlace, values: Tensor) -> None:
        """Count what is sent, or would be."""
        if place in self._counts:
            bucket = self._config.bucket_of(place[2], is_grad=place[1] == "grad")
            level_histogram(values.reshape(-1), bucket, self._counts[place])

    def learn(self) -> None:
        """Fit levels to what was counted."""
        for place, counts in self._counts.items():
            self._values[place] = fit_levels(
                self._values.get(place, uniform_levels(place[2])), counts
            )

    def _is_learned(self, place: LevelPlace) -> bool:
        return self._config.has_levels(place[2], is_grad=place[1] == "grad")


class SimulatedBudget:
    """The budget's squared errors of each parameter and direction at all bits, by global rank.

    Args:
        config: With the budget, if there is one.
        world: The ranks.
        claims: Those of coded weights, and of coded gradients, by name in the order in which ties
            are broken.

    Raises:
        ValueError: The budget is too small, or has nothing to allot.
    """

    def __init__(
        self,
        config: QSDPConfig,
        world: SimulatedRanks,
        claims: tuple[Mapping[str, Claim], Mapping[str, Claim]],
    ) -> None:
        self._config, self._world, self._claims = config, world, claims
        self._errors: dict[Place, list[float]] = {}
        self._is_allotted = False
        weights, grads = (list(own.values()) for own in claims)
        check_budget(weights, grads, config)

    def is_open(self, step: int) -> bool:
        """Whether ``step`` is one to measure in."""
        is_warm = step >= self._config.warmup_steps
        return self._config.has_budget and is_warm and not self._is_allotted

    def add(self, place: Place, rank: int, error: float) -> None:
        """Add an ``error`` to those that ``rank`` has at ``place``."""
        self._errors.setdefault(place, [0.0] * self._world.num_ranks)[rank] += error

    def allot(self, bits: Bits) -> Bits:
        """The bits that cost least by the errors so far, which are forgotten.

        Those given where an error is infinite or NaN.
        """
        totals = {
            (name, is_grad): [self._total((name, is_grad, b)) for b in CODED_BITS]
            for is_grad, claims in zip((False, True), self._claims, strict=True)
            for name, claim in claims.items()
            if claim.kept_bits is None
        }
        self._errors.clear()
        if not all(map(math.isfinite, itertools.chain(*totals.values()))):
            return bits
        self._is_allotted = True
        found = {name: list(both) for name, both in bits.items()}
        for is_grad, claims in zip((False, True), self._claims, strict=True):
            names = [name for name in claims if (name, is_grad) in totals]
            budget = self._config.budget_of(is_grad=is_grad)
            if budget is None:
                continue
            chosen = allot(
                list(claims.values()),
                [totals[name, is_grad] for name in names],
                budget,
                self._config,
                is_grad=is_grad,
            )
            for name, b in zip(names, chosen, strict=True):
                found[name][is_grad] = b
        return {name: (weight, grad) for name, (weight, grad) in found.items()}

    def _total(self, place: Place) -> float:
        """The error over all ranks: along replicas first, unless qsdp averages over them."""
        size, errors = self._world.world_size, self._errors.get(place, [])
        rows: Sequence[Sequence[float]] = [
            errors[i : i + size] for i in range(0, len(errors), size)
        ]
        if not self._world.quantized_replicas:
            rows = list(zip(*rows, strict=True))
        return sum((sum(row) for row in rows), 0.0)
