"""Grids that are kept for many steps, in the reference kernels: when one is drawn again, and codes.

The rule is that of [Note: Changes] in changes.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qsdp.codec.segment_table import Field, SegmentRow
from qsdp.common.splitmix64 import GOLDEN_GAMMA, finalize
from qsdp.ops.reference.codec import codes_on_grid, grid_numbers
from qsdp.ops.reference.grid import Extent, draw_grid, grid_steps, place_on_grid

LEAST_REACH = 0.25
"""Which part of a kept grid its values reach over at least: of a new one two thirds or so."""


class KeptGrids(NamedTuple):
    """The kept grids of a segment's buckets."""

    low: Tensor
    """fp32 [buckets]; NaN where a bucket holds what is not finite, and before it was sent."""
    scale: Tensor
    """fp32 [buckets], the sign bit set where the last code is kept for +0.0."""
    epoch: Tensor
    """int32 [buckets]: the step at which each was drawn."""

    def differ(self, others: KeptGrids) -> Tensor:
        """bool [buckets]: which are other ones, bit by bit."""
        pairs = zip(self, others, strict=True)
        differing = [a.view(torch.int32) != b.view(torch.int32) for a, b in pairs]
        return torch.stack(differing).any(0)


def kept_grids(segment: SegmentRow, row: Tensor) -> KeptGrids:
    """The kept grids of a segment, from uint8 [row bytes]: copies."""
    low, scale = segment.meta(row).clone().view(torch.float32).view(-1, 2).unbind(1)
    epochs = segment.epochs(row)
    assert epochs is not None
    return KeptGrids(low.contiguous(), scale.contiguous(), epochs.clone().view(torch.int32))


def grids_now(
    extent: Extent,
    kept: KeptGrids,
    segment: SegmentRow,
    step: int,
    redraw_every: int,
    room: float,
) -> KeptGrids:
    """The grids that measured buckets have now: the kept ones, or drawn again at ``step``.

    ``redraw_every`` is 0 for weights that are never due.
    """
    again = _has_outlived(extent, kept, segment)
    if redraw_every:
        again |= is_due(segment, kept.epoch, step, redraw_every)
    was_broken = kept.low.isnan()
    again = torch.where(extent.is_broken | was_broken, extent.is_broken != was_broken, again)
    low, scale = draw_grid(extent, segment, room)
    epoch = torch.full_like(kept.epoch, step)
    return KeptGrids(
        *(torch.where(again, *pair) for pair in zip((low, scale, epoch), kept, strict=True))
    )


def is_due(segment: SegmentRow, epoch: Tensor, step: int, redraw_every: int) -> Tensor:
    """bool [buckets]: which kept grids are due to be drawn again: each at another step."""
    first = segment.row[Field.PARAMETER] << 32
    with np.errstate(over="ignore"):
        numbers = np.arange(epoch.numel(), dtype=np.uint64) + np.uint64(first + GOLDEN_GAMMA)
        hashes = torch.from_numpy((finalize(numbers) >> np.uint64(33)).astype(np.int64))
    hashes = hashes.to(epoch.device)
    return (step + hashes) // redraw_every > (epoch + hashes) // redraw_every


def codes_now(extent: Extent, grids: KeptGrids, segment: SegmentRow, key: int) -> Tensor:
    """The codes, int64 [buckets, bucket], of measured values on kept grids; 0 behind the last."""
    r = grid_numbers(segment, key, extent.values, grids.epoch)
    codes = codes_on_grid(extent, grids.low, grids.scale, segment, r).long()
    codes.view(-1)[segment.numel :] = 0
    return codes


def _has_outlived(extent: Extent, kept: KeptGrids, segment: SegmentRow) -> Tensor:
    """bool [buckets]: whether values do not fit their kept grid, or have their first zero."""
    steps = grid_steps(kept.scale.signbit(), segment)
    least, most = (place_on_grid(x, kept.low, kept.scale) for x in (extent.low, extent.high))
    fits = torch.where(
        kept.scale == 0,
        (extent.low == kept.low) & (extent.high == kept.low),
        (least >= 0) & (most <= steps) & (most - least >= LEAST_REACH * steps),
    )
    return extent.has_zero & ~kept.scale.signbit() | ~extent.is_empty & ~fits
