"""Learned levels of all parameters: where they stand, and how ranks learn them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from itertools import pairwise
from reprlib import repr as shown
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.codec.level_fitting import BINS, fit_levels, level_histogram, uniform_levels
from qsdp.codec.segment_table import Field
from qsdp.comm.traffic import Traffic
from qsdp.common.collective_errors import collective
from qsdp.compat.process_groups import control_device
from qsdp.config import LEARNED_BITS, QSDPConfig


class LevelKind(IntEnum):
    """Which values of a parameter have learned levels of their own."""

    WEIGHT = 0
    GRAD = 1
    KEPT = 2
    """Weights under a mask: few are near zero, so that levels of whole weights would not fit."""
    FROZEN = 3
    """Weights that are sent once for all steps, on the uniform grid."""


_LEARNED_KINDS = {"weight": LevelKind.WEIGHT, "grad": LevelKind.GRAD, "kept": LevelKind.KEPT}
_STRIDE = sum(1 << bits for bits in LEARNED_BITS)


def levels_offset(config: QSDPConfig, parameter: int, bits: int, kind: LevelKind) -> int:
    """Where a parameter's learned levels start in ``LearnedLevels.values``; -1: uniform ones."""
    is_grad = kind == LevelKind.GRAD
    if kind == LevelKind.FROZEN or not config.has_levels(bits, is_grad=is_grad):
        return -1
    return _start_of_levels(parameter, bits, kind)


def _start_of_levels(parameter: int, bits: int, kind: LevelKind) -> int:
    before = sum(1 << b for b in LEARNED_BITS if b < bits)
    return (len(_LEARNED_KINDS) * parameter + kind) * _STRIDE + before


def check_level_rows(rows: Iterable[Any]) -> None:
    """Raise ValueError unless ``rows`` are such as ``LearnedLevels.state`` gives.

    Each has levels that the codec can take, and none is there twice.
    """
    seen = set()
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) < 3:
            raise ValueError(
                f"the state has {shown(row)} among its levels: give rows [name, kind, bits, level, "
                "...], as state_dict() returned it."
            )
        name, kind, bits, *levels = row
        whose = f"{name}'s {kind} of {bits} bits"
        is_known = type(name) is type(kind) is str and kind in _LEARNED_KINDS
        is_coded = type(bits) is int and bits in LEARNED_BITS
        if not is_known or not is_coded or len(levels) != 1 << bits:
            raise ValueError(
                f"the state has {len(levels)} levels for {whose}: give 2**bits of "
                f"{', '.join(_LEARNED_KINDS)} at 2 to 6 bits, as state_dict() returned it."
            )
        is_real = all(type(level) in (int, float) for level in levels)
        if not is_real or (levels[0], levels[-1]) != (0, 1) or not _ascend(levels):
            raise ValueError(
                f"the state has the levels {shown(levels)} for {whose}: give numbers from 0 to 1 "
                "in ascending order, as state_dict() returned it."
            )
        if (name, kind, bits) in seen:
            raise ValueError(f"the state has levels for {whose} twice: give them once.")
        seen.add((name, kind, bits))


def _ascend(levels: Sequence[float]) -> bool:
    return all(a <= b for a, b in pairwise(levels))  # a NaN does not


class LearnedLevels:
    """The learned levels of each parameter and kind, for all bits that have some.

    ``values`` holds them, fp32 on the CPU, from the places that ``levels_offset`` gives. It is
    changed in place.

    Args:
        indices: The indices of the model's parameters, from 0 on, by their names.
    """

    def __init__(self, indices: Mapping[str, int]) -> None:
        self._indices = indices
        self.values = self._uniform()
        self._learned: set[tuple[int, int]] = set()

    def learn(
        self, counts: LevelCounts, groups: Iterable[dist.ProcessGroup], traffic: Traffic
    ) -> None:
        """Fit all levels that ``counts`` has places for to the counts of all ranks.

        These are added up over one of ``groups`` after the other: a collective, alike on all ranks.
        Levels of which nothing was counted stay.
        """
        places = counts.places
        if not places:
            return
        for group in groups:
            device = control_device(group)
            total = torch.stack([counts.by_place[place].to(device) for place in places])
            with collective("sum of what levels are learned from"):
                dist.all_reduce(total, group=group)
            traffic.summed(group, total.nbytes)
            counts.by_place = dict(zip(places, total.cpu(), strict=True))
        for start, bits in places:
            if counts.by_place[start, bits].any():
                levels = self.values[start : start + (1 << bits)]
                levels.copy_(fit_levels(levels, counts.by_place[start, bits]))
                self._learned.add((start, bits))

    def state(self) -> list[list[Any]]:
        """Rows [name, "weight" or "grad" or "kept", bits, level, ...] of what was learned.

        Floats survive JSON exactly.
        """
        names = {index: name for name, index in self._indices.items()}
        rows: list[list[Any]] = []
        for start, bits in sorted(self._learned):
            parameter, kind = divmod(start // _STRIDE, len(_LEARNED_KINDS))
            levels = self.values[start : start + (1 << bits)].tolist()
            rows.append([names[parameter], LevelKind(kind).name.lower(), bits, *levels])
        return rows

    def load(self, rows: Iterable[Sequence[Any]]) -> None:
        """Take over what ``state`` gave, in place of all that was learned."""
        self.values.copy_(self._uniform())
        self._learned.clear()
        for name, kind, bits, *levels in rows:
            start = _start_of_levels(self._indices[name], bits, _LEARNED_KINDS[kind])
            self.values[start : start + len(levels)] = torch.tensor(levels)
            self._learned.add((start, bits))

    def rewind_point(self) -> Callable[[], None]:
        """A function that restores everything as it is now."""
        values, learned = self.values.clone(), set(self._learned)

        def rewind() -> None:
            self.values.copy_(values)
            self._learned = learned

        return rewind

    def _uniform(self) -> Tensor:
        slot = torch.cat([uniform_levels(bits) for bits in LEARNED_BITS])
        return slot.repeat(len(_LEARNED_KINDS) * len(self._indices))


class LevelCounts:
    """What learned levels are learned from: histograms of values, by the levels' places.

    Values are normalised by bucket.

    Args:
        places: (start, bits) of all levels in use, the same on all ranks.
    """

    def __init__(self, places: Iterable[tuple[int, int]]) -> None:
        self.places = sorted(set(places))
        self.by_place = {place: torch.zeros(BINS, dtype=torch.int64) for place in self.places}

    def copy(self) -> LevelCounts:
        """Another one that has seen the same."""
        other = LevelCounts(self.places)
        other.by_place = {place: counts.clone() for place, counts in self.by_place.items()}
        return other

    def add_values(self, row: list[int], values: Tensor, kind: LevelKind) -> None:
        """Count the 1-D ``values`` of one table row's segment, where it has levels."""
        place = (row[Field.LEVELS], row[Field.BITS])
        if place in self.by_place:
            out = self.by_place[place] = self.by_place[place].to(values.device)
            level_histogram(values, row[Field.BUCKET], out)
