"""Fitting learned levels: histograms of bucket-normalised values, and the levels that fit best.

QSDP (arXiv 2302.02390, section 5) learns a tensor's levels by online gradient descent: at chosen
steps it runs over the normalised values and moves levels a little for each. Here the values are
counted first and ``fit_levels`` minimises over the counts, for two reasons: counts of all ranks
add up exactly, so that all ranks find the same levels; and the objective, the expected squared
error of stochastic rounding between neighbouring levels, then has an exact minimum in each level
while the others stay, so that neither a learning rate nor an order of the values is left to choose.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from itertools import accumulate

import torch
from torch import Tensor

BINS = 1024
_CHUNK = 1 << 20  # values that are counted at once: bounds the memory
_SWEEPS = 100


def uniform_levels(bits: int) -> Tensor:
    """The levels that fitting begins with, fp32 [2**bits]: the uniform grid from 0 to 1."""
    return torch.arange(1 << bits, dtype=torch.float32) / ((1 << bits) - 1)


def level_histogram(values: Tensor, bucket: int, out: Tensor) -> None:
    """Count, for the fitting of levels, the normalised values (x - lo) / (hi - lo) of buckets.

    What levels do not serve is left out: buckets with exact zeros, all-equal ones, those with a NaN
    or an Inf, and the ends of the others, which are exact under any levels.

    Args:
        values: fp32, bf16 or fp16 [n]; the last bucket may be shorter.
        bucket: Values a bucket.
        out: int64 [BINS], added to.
    """
    assert values.dim() == 1
    assert out.dtype == torch.int64
    assert out.shape == (BINS,)
    for part in values.split(max(1, _CHUNK // bucket) * bucket):
        whole = part.numel() // bucket * bucket
        for x_NB in (part[:whole].view(-1, bucket), part[whole:].view(1, -1)):
            if x_NB.numel():
                out += _counts(x_NB.float()).to(out.device)


def expected_error(levels: Tensor, counts: Tensor) -> float:
    """The error that fitting levels makes least: mean squared, in units of (hi - lo)**2.

    Args:
        levels: fp32 [2**bits], from 0 to 1, non-decreasing.
        counts: int64 [BINS] of ``level_histogram``; a bin's values count as its centre.
    """
    at, terms = levels.tolist(), []
    for k, count in enumerate(counts.tolist()):
        if count:
            v = (k + 0.5) / BINS
            i = min(bisect_right(at, v), len(at) - 1)
            terms.append(count * (v - at[i - 1]) * (at[i] - v))
    # Exactly rounded: no order of summation is left open.
    return math.fsum(terms) / max(int(counts.sum()), 1)


def fit_levels(levels: Tensor, counts: Tensor) -> Tensor:
    """Fit levels to ``counts``: of least ``expected_error``, by descent from a good start.

    Equal counts give equal levels, bit for bit, on every machine: the descent is in integers, and
    the start takes square roots alone. The levels are non-decreasing from 0 to 1, and never worse
    than the given ones; without counts the given ones are returned.

    Args:
        levels: fp32 [2**bits], the levels so far.
        counts: int64 [BINS], see ``level_histogram``.

    Returns:
        fp32 [2**bits].
    """
    assert levels.dtype == torch.float32
    assert counts.shape == (BINS,)
    histogram = counts.tolist()
    if not any(histogram):
        return levels.clone()
    bins = _descend(_start(histogram, levels.numel() - 2), histogram)
    inner = (torch.tensor(bins, dtype=torch.float32) + 0.5) / BINS
    found = torch.cat((torch.zeros(1), inner, torch.ones(1)))
    is_better = expected_error(found, counts) < expected_error(levels, counts)
    return found if is_better else levels.clone()


def _counts(x_NB: Tensor) -> Tensor:
    """int64 [BINS] of fp32 buckets."""
    low_N, high_N = x_NB.aminmax(dim=1, keepdim=True)
    width_N = high_N - low_N
    is_served_N = (width_N >= torch.finfo(torch.float32).tiny) & width_N.isfinite()
    is_served_N &= ~(x_NB == 0).any(1, keepdim=True)
    left_out_NB = ~is_served_N | (x_NB <= low_N) | (x_NB >= high_N)
    bins_NB = ((x_NB - low_N) / width_N * BINS).clamp_(max=BINS - 1)
    bins_NB = bins_NB.masked_fill_(left_out_NB, BINS).int()
    return torch.bincount(bins_NB.view(-1), minlength=BINS + 1)[:BINS]


def _start(histogram: list[int], num: int) -> list[int]:
    """Bins of ``num`` levels whose density is near the cube root of the values' density.

    That is the best density of many levels (Panter and Dite, 1951). The power is 5/16, which takes
    square roots alone: every machine rounds them alike.
    """
    roots = [math.sqrt(math.sqrt(count)) for count in histogram]
    below = list(accumulate(root * math.sqrt(math.sqrt(root)) for root in roots))
    return [bisect_left(below, below[-1] * (i + 1) / (num + 1)) for i in range(num)]


def _descend(bins: list[int], histogram: list[int]) -> list[int]:
    """Move each level to its best place between its neighbours until none moves.

    Between neighbours a < b the error of a level l is the sum of count * (v - a) * (l - v) over
    a < v < l and of count * (v - l) * (b - v) over l < v < b: convex in l, with slope
    sum(count * v) - b * sum(count) + (b - a) * (how many v <= l), which changes sign at a bin.
    Places are in half bins, a bin's centre is odd, and all sums are integers.
    """
    num = [0, *accumulate(histogram)]
    moment = [0, *accumulate(count * (2 * k + 1) for k, count in enumerate(histogram))]
    bins = [-1, *bins, BINS]
    places = [0, *(2 * k + 1 for k in bins[1:-1]), 2 * BINS]
    for _ in range(_SWEEPS):
        before = list(bins)
        for i in range(1, len(bins) - 1):
            first, end = bins[i - 1] + 1, bins[i + 1]
            between = num[end] - num[first] if first < end else 0
            if not between:
                continue
            a, b = places[i - 1], places[i + 1]
            lacking = b * between - (moment[end] - moment[first])
            at_most = -(-lacking // (b - a))
            bins[i] = bisect_left(num, num[first] + at_most, first + 1, end) - 1
            places[i] = 2 * bins[i] + 1
        if bins == before:
            break
    return bins[1:-1]
