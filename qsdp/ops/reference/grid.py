"""A bucket's grid in the reference kernels, measured and drawn: [Note: Grid] in codec.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsdp.codec.segment_table import SegmentRow

HUGE_VALUE = 2.0**120
HUGE_SCALE = 2.0**112
HUGE_FACTOR = 2.0**-8


class Extent(NamedTuple):
    """The grid's bounds before it is drawn: what is measured of buckets, [buckets] each."""

    values: Tensor
    """fp32 [buckets, bucket], padded."""
    zero: Tensor
    """bool [buckets, bucket]: which are zero."""
    low: Tensor
    """The least of the values that are not zero; 0 where there are none."""
    high: Tensor
    has_zero: Tensor
    is_empty: Tensor
    """Whether all are zero."""
    is_broken: Tensor
    """Whether there are a NaN or an Inf."""


def measure(x: Tensor, segment: SegmentRow) -> Extent:
    """What the reference codec measures of the buckets of fp32 [n]: [Note: Grid]."""
    buckets = -(-x.numel() // segment.bucket)
    x_NB = torch.nn.functional.pad(x, (0, buckets * segment.bucket - x.numel()), value=1.0)
    x_NB = x_NB.view(buckets, segment.bucket)
    valid = torch.arange(x_NB.numel(), device=x.device).view_as(x_NB) < x.numel()
    zero = valid & (x_NB == 0)
    live = valid & ~zero
    empty = ~live.any(1)
    low = x_NB.masked_fill(~live, torch.inf).amin(1).masked_fill(empty, 0.0)
    high = x_NB.masked_fill(~live, -torch.inf).amax(1).masked_fill(empty, 0.0)
    broken = (valid & ~x_NB.isfinite()).any(1)
    return Extent(x_NB, zero, low, high, zero.any(1), empty, broken)


def grid_steps(keeps_zero: Tensor, segment: SegmentRow) -> Tensor:
    """fp32 [buckets]: the steps of a grid, one less where it keeps its last code for +0.0."""
    return torch.where(keeps_zero, segment.num_codes - 2, segment.num_codes - 1).float()


def draw_grid(extent: Extent, segment: SegmentRow, room: float = 0.0) -> tuple[Tensor, Tensor]:
    """The lows and scales, fp32 [buckets], that the reference codec gives to measured buckets.

    ``room`` is left free on both sides, as a part of the range: [Note: Changes].
    """
    steps = grid_steps(extent.has_zero, segment)
    low, broken = extent.low, extent.is_broken
    d = extent.high / steps - low / steps
    d = d.masked_fill(broken | (d < torch.finfo(torch.float32).tiny), 0.0)
    if room:
        wider, lower = d + _fp32(2 * room) * d, low - _fp32(room) * (steps * d)
        fits = wider.isfinite() & lower.isfinite()
        d, low = torch.where(fits, wider, d), torch.where(fits, lower, low)
    return low.masked_fill(broken, torch.nan), torch.where(extent.has_zero & ~broken, -d, d)


def place_on_grid(x: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """The reference codec's t of [Note: Grid], of values on grids whose shapes go with theirs."""
    d = scale.abs()
    factor = huge_factor(low, d)
    inverse = (1 / (d * factor)).masked_fill(d == 0, 0.0)
    return (x * factor - low * factor) * inverse


def has_learned_levels(low: Tensor, scale: Tensor) -> Tensor:
    """Whether learned levels serve a bucket on this grid: both sides see it alike."""
    return (scale > 0) & (huge_factor(low, scale) == 1)


def huge_factor(low: Tensor, d: Tensor) -> Tensor:
    """By what a bucket on this grid is scaled while it is worked on, fp32 [buckets]."""
    huge = (low.abs() > HUGE_VALUE) | (d > HUGE_SCALE)
    return torch.where(huge, HUGE_FACTOR, 1.0).to(torch.float32)


def _fp32(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float32)
