"""The grids that the simulated ranks keep when only changed codes are sent (``gather="delta"``).

Written from [Note: Changes] in ops/reference/changes.py, apart from its kernels but for the
arithmetic of a value on a grid. Codes are made of weight, grid and epoch each time, and what is
kept of them serves to count bytes alone. A run that decodes the same has no more in its codes
either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qsdp.codec.segment_table import Field, SegmentRow
from qsdp.common.checksum import checksum
from qsdp.common.splitmix64 import GOLDEN_GAMMA, MASK, finalize
from qsdp.ops.reference.codec import codes_on_grid, dequantize, grid_numbers
from qsdp.ops.reference.grid import Extent, draw_grid, measure, place_on_grid
from qsdp.ops.reference.packing import convert_values
from qsdp.simulation.simulated_frames import Place, SimulatedFrames


class ShardGrids(NamedTuple):
    """The simulated grids of a shard's buckets: 12 bytes a bucket."""

    low: Tensor
    """fp32 [buckets]: the value of the least code; NaN where a bucket has what is not finite."""
    scale: Tensor
    """fp32 [buckets]: from a code to the next, with the sign bit where the last one is for +0.0."""
    epoch: Tensor
    """int32 [buckets]: the step at which each was drawn."""

    def differ(self, others: ShardGrids) -> Tensor:
        """bool [buckets]: which are not the same, bit by bit."""
        pairs = zip(self, others, strict=True)
        return torch.stack([a.view(torch.int32) != b.view(torch.int32) for a, b in pairs]).any(0)


Form = tuple[tuple[int, int | None], ...]
"""What a group's grids depend on beside values: of each parameter the bits, and which mask."""


class _Kept(NamedTuple):
    """What is kept of one group."""

    form: Form
    """At its last gather."""
    shards: dict[Place, tuple[ShardGrids, int | None]]
    """With grids, a checksum of the shard that was gathered if it is frozen."""


class SimulatedGrids:
    """The simulated grids of all shards, which every rank would keep, in every replica the same.

    Args:
        room: What is left free on both sides of a grid that is drawn, as a part of its range.
        redraw_every: Steps for which one is kept at most.
    """

    def __init__(self, room: float, redraw_every: int) -> None:
        self._room, self._redraw_every = room, redraw_every
        self._kept: dict[int, _Kept] = {}
        self.frames = SimulatedFrames()
        """What is sent of changes."""

    def fit(self, group: int, form: Form) -> None:
        """Begin a gather of ``group``, which forgets its grids if they are of another ``form``."""
        if group not in self._kept or self._kept[group].form != form:
            self._kept[group] = _Kept(form, {})
            self.frames.forget(group)

    def gather(
        self,
        group: int,
        place: Place,
        values: Tensor,
        segment: SegmentRow,
        key: int,
        step: int,
        shard: Tensor,
    ) -> Tensor:
        """What all ranks decode in ``step`` of the ``values`` of a ``shard``, in their dtype.

        Grids are drawn first where they have to be. A frozen shard that nobody has edited since it
        was gathered is not looked at.
        """
        extent = measure(values.reshape(-1).float(), segment)
        scale = torch.zeros_like(extent.low)
        unsent = ShardGrids(scale + torch.nan, scale, scale.int())
        shards = self._kept[group].shards
        before, seen = shards.get(place, (unsent, None))
        grids = before
        content = None if shard.requires_grad else checksum([shard])
        if content is None or content != seen:
            every = self._redraw_every if content is None else None
            grids = self._drawn_anew(grids, extent, segment, step, every)
        shards[place] = grids, content
        r = grid_numbers(segment, key, extent.values, grids.epoch)
        codes = codes_on_grid(extent, grids.low, grids.scale, segment, r).to(torch.uint8)
        self.frames.say_codes(group, place, segment, codes, grids.differ(before))
        decoded = dequantize(
            codes.view(-1)[: segment.numel], *grids[:2], segment, key, None, grids.epoch
        )
        limit = torch.finfo(values.dtype).max
        return convert_values(decoded.clamp(-limit, limit), values.dtype).view(values.shape)

    def rewind_point(self) -> Callable[[Collection[int | None]], None]:
        """A function that takes back what was drawn since, but of the groups that it is given."""
        before = {group: _Kept(own.form, {**own.shards}) for group, own in self._kept.items()}
        rewind_frames = self.frames.rewind_point()

        def rewind(gathered: Collection[int | None]) -> None:
            since = {group: own for group, own in self._kept.items() if group in gathered}
            resting = {group: own for group, own in before.items() if group not in gathered}
            self._kept = since | resting
            rewind_frames(gathered)

        return rewind

    def _drawn_anew(
        self,
        kept: ShardGrids,
        extent: Extent,
        segment: SegmentRow,
        step: int,
        redraw_every: int | None,
    ) -> ShardGrids:
        """The grids with those drawn anew that do not fit what was measured, or are due."""
        is_held = _holds(kept, extent, segment)
        if redraw_every is not None:
            is_held &= ~_is_due(kept.epoch, segment, step, redraw_every)
        # A grid of NaN, which holds no number, is all that a bucket with one of these has.
        is_held = torch.where(extent.is_broken, kept.low.isnan(), is_held)
        low, scale = self._draw(extent, segment)
        epoch = torch.full_like(kept.epoch, step)
        return ShardGrids(
            torch.where(is_held, kept.low, low),
            torch.where(is_held, kept.scale, scale),
            torch.where(is_held, kept.epoch, epoch),
        )

    def _draw(self, extent: Extent, segment: SegmentRow) -> tuple[Tensor, Tensor]:
        """Lows and scales of grids with room on both sides, where that is finite."""
        low, scale = draw_grid(extent, segment)
        once, twice = (torch.tensor(n * self._room, dtype=torch.float32) for n in (1, 2))
        narrow = scale.abs()
        wide = narrow + twice * narrow
        lower = low - once * (_steps(scale, segment) * narrow)
        is_finite = torch.isfinite(wide) & torch.isfinite(lower)
        wide = torch.where(is_finite, wide, narrow)
        return torch.where(is_finite, lower, low), wide.copysign(scale)


def _steps(scale: Tensor, segment: SegmentRow) -> Tensor:
    """fp32 [buckets]: how many steps a grid has between its least code and its greatest."""
    return torch.full_like(scale, segment.num_codes - 1) - scale.signbit().float()


def _holds(kept: ShardGrids, extent: Extent, segment: SegmentRow) -> Tensor:
    """bool [buckets]: whether kept grids have codes for the values that are finite, and enough."""
    first, last = (place_on_grid(end, *kept[:2]) for end in (extent.low, extent.high))
    steps = _steps(kept.scale, segment)
    has_live = (first >= 0) & (last <= steps) & (4 * (last - first) >= steps)
    # A grid of one value holds nothing else.
    is_flat = kept.scale.abs() == 0
    has_live[is_flat] = ((extent.low == kept.low) & (extent.high == kept.low))[is_flat]
    return (has_live | extent.is_empty) & (kept.scale.signbit() | ~extent.has_zero)


def _is_due(epoch: Tensor, segment: SegmentRow, step: int, redraw_every: int) -> Tensor:
    """bool [buckets]: whether kept grids are due to be drawn: those of a shard at many steps."""
    first = np.uint64((segment.row[Field.PARAMETER] << 32) + GOLDEN_GAMMA & MASK)
    hashes = finalize(np.arange(epoch.numel(), dtype=np.uint64) + first)
    phase = (hashes >> np.uint64(33)).astype(np.int64)
    due = (step + phase) // redraw_every > (epoch.cpu().numpy() + phase) // redraw_every
    return torch.from_numpy(due).to(epoch.device)
