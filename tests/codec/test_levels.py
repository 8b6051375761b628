"""Learned levels: their arithmetic against an independent reference, and how well they fit.

That compiled kernels give the specification's bytes is tested in tests/ops/test_codec_kernels.py,
what is refused in tests/ops/test_codec_refusals.py.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from qsdp.codec import levels as learning
from qsdp.codec.levels import BINS, expected_error, fit, histogram, uniform_levels
from qsdp.common.rounding import Rounding
from qsdp.config import LEARNED_BITS
from tests.support import codec_reference as reference
from tests.support.codec_wire import DTYPES, KEY, LARGEST, fresh, send

ROUNDINGS = tuple(each.label for each in Rounding if each.properties.has_levels)
FALSE_ALARM = 1e-7


def some_levels(bits: int, rng: np.random.Generator, equal: bool = True) -> Tensor:
    """Levels at random; with ``equal`` a third of them equal a neighbour, the ends' ones too."""
    levels = np.sort(rng.random(2**bits)).astype(np.float32)
    levels[0], levels[-1] = 0, 1
    if equal:
        doubled = 1 + np.flatnonzero(rng.random(2**bits - 2) < 0.3)
        levels[doubled] = levels[doubled + 1]
        levels[1] *= rng.random() < 0.7
        levels.sort()
    return torch.from_numpy(levels)


def mixed_buckets(rng: np.random.Generator, bucket: int) -> np.ndarray:
    """Buckets of every kind, those beside each limit of what levels serve among them."""
    kinds = [rng.standard_normal(bucket).astype(np.float32) for _ in range(30)]
    kinds[1] += np.float32(1000)
    kinds[2] *= np.float32(2.0**-144)
    kinds[3] *= np.float32(LARGEST / np.abs(kinds[3]).max() * 0.99999)
    kinds[4][::3] = 0.0
    kinds[5][1] = -0.0
    kinds[6][:] = kinds[6][0]
    kinds[7][:] = 0.0
    kinds[8][:] = np.where(rng.random(bucket) < 0.5, kinds[8][0], 0.0)
    kinds[9][rng.integers(bucket)] = np.nan
    kinds[10][rng.integers(bucket)] = -np.inf
    for kind, factor in zip(kinds[11:17], (0.25, 0.99, 1.01, 2, 20, 200), strict=True):
        spread = np.abs(kind).max()
        kind *= np.float32(2.0**112 * factor / spread)  # around the greatest step
    for kind, limit in zip(kinds[17:21], (2.0**120, -(2.0**120)) * 2, strict=True):
        kind *= np.float32(2.0**105)  # around the greatest value
        kind += np.float32(limit)
    for kind, factor in zip(kinds[21:27], (0.5, 1, 2, 10, 40, 100), strict=True):
        kind *= np.float32(2.0**-126 * factor / (kind.max() - kind.min()))  # the least step
    kinds[27][:] = np.where(rng.random(bucket) < 0.5, kinds[27].min(), kinds[27].max())
    kinds[28] = np.abs(kinds[28]) ** 9 + np.float32(1e-3)
    return np.concatenate(kinds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("bits", LEARNED_BITS)
def test_bytes_and_values_equal_the_references(bits, how, dtype):
    rng = fresh()
    bucket = 24
    with np.errstate(invalid="ignore"):
        x = torch.from_numpy(mixed_buckets(rng, bucket)[: -int(rng.integers(1, bucket))]).to(dtype)
    levels = some_levels(bits, rng)
    sent = send(x, bits, how, bucket=bucket, parameter=11, group=4, levels=levels)
    given = x.float().numpy()
    arguments = (bits, bucket, how, 11, 4, reference.fold(KEY))
    meta, codes, values = reference.encode_segment(given, *arguments, levels.numpy())
    assert sent.meta == meta
    assert sent.codes == codes
    limit = torch.finfo(dtype).max
    expected = torch.from_numpy(values).clamp(-limit, limit).to(dtype)
    assert torch.equal(sent.values.isnan(), expected.isnan())
    live = ~expected.isnan().repeat_interleave(dtype.itemsize)
    assert torch.equal(sent.values.view(torch.uint8)[live], expected.view(torch.uint8)[live])


@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("bits", LEARNED_BITS)
def test_lengths_around_every_boundary(bits, how):
    rng = fresh()
    levels = some_levels(bits, rng)
    for num in (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65):
        x = torch.from_numpy(rng.standard_normal(num).astype(np.float32))
        sent = send(x, bits, how, bucket=16, levels=levels)
        meta, codes, values = reference.encode_segment(
            x.numpy(), bits, 16, how, 5, 2, reference.fold(KEY), levels.numpy()
        )
        assert (sent.meta, sent.codes) == (meta, codes)
        assert torch.equal(sent.values, torch.from_numpy(values))


@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("bits", LEARNED_BITS)
def test_buckets_that_levels_do_not_serve_travel_on_the_uniform_grid(bits, how):
    rng = fresh()
    huge = rng.uniform(-LARGEST, LARGEST, 16)
    wide = rng.uniform(-1, 1, 16) * 2.0**112 * 2**bits
    broken = np.where(np.arange(16) == 3, np.inf, rng.standard_normal(16))
    zeros = np.where(np.arange(16) == 5, 0, rng.standard_normal(16))
    narrow = rng.uniform(1, 1.5, 16) * 2.0**-125
    rows = [huge, wide, broken, zeros, narrow, np.full(16, 1.7), np.zeros(16)]
    x = torch.from_numpy(np.stack(rows).astype(np.float32)).view(-1)
    sent = send(x, bits, how, bucket=16, levels=some_levels(bits, rng))
    assert torch.equal(sent.payload[32:], send(x, bits, how, bucket=16).payload[32:])
    plain = send(x, bits, how, bucket=16).values
    assert torch.equal(sent.values.view(torch.int32), plain.view(torch.int32))


@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("bits", LEARNED_BITS)
def test_values_at_the_levels_arrive_as_they_are_under_every_key(bits, how):
    """Levels are made of the values' own places, so that every value lies on one, exactly."""
    rng = fresh()
    x = np.sort(rng.standard_normal(2**bits)).astype(np.float32)
    d = np.float32(x[-1] / np.float32(2**bits - 1)) - np.float32(x[0] / np.float32(2**bits - 1))
    width = np.float32(d * np.float32(2**bits - 1))
    places = ((x - x[0]) * (np.float32(1) / width)).astype(np.float32)
    places[0], places[-1] = 0, 1
    order = rng.permutation(2**bits)
    given = torch.from_numpy(x[order])
    bound = 4 * torch.finfo(torch.float32).eps * float(np.abs(x).max())
    for step in range(20):
        key = KEY._replace(step=step)
        sent = send(given, bits, how, key=key, levels=torch.from_numpy(places))
        assert reference.unpack(sent.codes, bits, 2**bits) == order.tolist()
        assert float((sent.values - given).abs().max()) <= bound


@pytest.mark.parametrize("bits", LEARNED_BITS)
def test_nearest_takes_the_nearest_level(bits):
    rng = fresh()
    x = torch.from_numpy(rng.standard_normal(4096).astype(np.float32))
    levels = some_levels(bits, rng)
    got = send(x, bits, "nearest", bucket=64, levels=levels).values.view(-1, 64).double()
    x_NB = x.view(-1, 64).double()
    low, high = x_NB.amin(1, keepdim=True), x_NB.amax(1, keepdim=True)
    places = low + (high - low) * levels.double()
    least = (x_NB[:, :, None] - places[:, None, :]).abs().amin(2)
    assert bool(((got - x_NB).abs() <= least + 1e-6).all())


NUM_KEYS, BUCKETS, WIDTH = 20, 1000, 16


def repeated_errors(x: Tensor, bits: int, how: str, levels: Tensor, seed: int) -> Tensor:
    """(decoded - x) / (hi - lo) of one bucket sent 20,000 times, under 20 keys: [20000, WIDTH]."""
    errors = []
    for step in range(NUM_KEYS):
        key = KEY._replace(seed=seed, step=step)
        sent = send(x.repeat(BUCKETS), bits, how, key=key, bucket=WIDTH, levels=levels)
        errors.append(sent.values.view(BUCKETS, WIDTH).double() - x.double())
    return torch.cat(errors) / float(x.max() - x.min())


def allowed_bias(x: Tensor, levels: Tensor) -> Tensor:
    """Hoeffding's bound on the mean error of each value: an error lies within one gap of levels.

    A right quantizer exceeds it with probability FALSE_ALARM over all values and bits together.
    """
    v = ((x - x.min()) / (x.max() - x.min())).double()
    above = torch.searchsorted(levels.double(), v, right=True).clamp(1, levels.numel() - 1)
    gap = levels.double()[above] - levels.double()[above - 1]
    comparisons = WIDTH * len(LEARNED_BITS)
    width = math.sqrt(math.log(2 * comparisons / FALSE_ALARM) / (2 * NUM_KEYS * BUCKETS))
    return gap * (width + 2.0**-16) + 1e-6


@pytest.mark.parametrize("bits", LEARNED_BITS)
def test_every_value_of_a_bucket_is_unbiased(bits):
    """Each of 16 values, ends included, over 20,000 roundings under 20 keys."""
    rng = fresh()
    x = torch.from_numpy(rng.standard_normal(WIDTH).astype(np.float32))
    levels = some_levels(bits, rng)
    errors = repeated_errors(x, bits, "stochastic", levels, int(rng.integers(2**62)))
    assert bool((errors.mean(0).abs() <= allowed_bias(x, levels)).all())


def test_nearest_fails_the_test_of_bias():
    rng = fresh()
    x = torch.linspace(-1.2, 1.7, WIDTH)
    levels = some_levels(2, rng, equal=False)
    errors = repeated_errors(x, 2, "nearest", levels, seed=0)
    assert float((errors.mean(0).abs() / allowed_bias(x, levels)).max()) > 5


@pytest.mark.parametrize("bits", LEARNED_BITS)
def test_the_mean_squared_error_is_the_expected_one(bits):
    """What ``expected_error`` says of a histogram is what the wire does to the values, to 3%."""
    rng = fresh()
    x = torch.from_numpy(rng.standard_normal((2000, 128)).astype(np.float32))
    counts = counts_of(x.view(-1), 128)
    for levels in (uniform_levels(bits), fit(uniform_levels(bits), counts)):
        key = KEY._replace(seed=int(rng.integers(2**62)))
        sent = send(x.view(-1), bits, "stochastic", key=key, bucket=128, levels=levels)
        width = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        error = ((sent.values.view_as(x) - x) / width).double().square().sum()
        expected = expected_error(levels, counts) * float(counts.sum())
        assert float(error) == pytest.approx(expected, rel=0.03)


# ---- the histogram


def counts_of(values: Tensor, bucket: int) -> Tensor:
    out = torch.zeros(BINS, dtype=torch.int64)
    histogram(values, bucket, out)
    return out


def slow_counts(x: np.ndarray, bucket: int) -> np.ndarray:
    counts = np.zeros(BINS, np.int64)
    for start in range(0, len(x), bucket):
        part = x[start : start + bucket]
        if not np.isfinite(part).all() or (part == 0).any():
            continue
        low, high = part.min(), part.max()
        width = np.float32(high - low)
        if not 2.0**-126 <= width < np.inf:
            continue
        for value in part:
            if low < value < high:
                v = np.float32(np.float32(value - low) / width)
                counts[min(int(v * np.float32(BINS)), BINS - 1)] += 1
    return counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_histogram_counts_the_normalised_values_of_ordinary_buckets(dtype, monkeypatch):
    rng = fresh()
    with np.errstate(all="ignore"):
        ordinary = rng.standard_normal(20 * 24).astype(np.float32)
        x = torch.from_numpy(np.concatenate([ordinary, mixed_buckets(rng, 24)[:-5]])).to(dtype)
        expected = slow_counts(x.float().numpy(), 24)
    assert expected.sum() > 100
    counts = counts_of(x, 24)
    assert counts.tolist() == expected.tolist()
    histogram(x, 24, counts)
    assert counts.tolist() == (2 * expected).tolist(), "counts are not added"
    monkeypatch.setattr(learning, "_CHUNK", 100)
    assert counts_of(x, 24).tolist() == expected.tolist(), "counting by parts changes counts"
    assert not counts_of(x[:0], 24).any()
    assert counts_of(x[:7], 24).tolist() == slow_counts(x[:7].float().numpy(), 24).tolist()


# ---- the fit


def gaussian_counts(rng: np.random.Generator, bucket: int = 128) -> Tensor:
    x = rng.standard_normal(bucket * 2000).astype(np.float32)
    return counts_of(torch.from_numpy(x), bucket)


def odd_counts(rng: np.random.Generator) -> list[Tensor]:
    """Histograms that are hard to fit: few values, gaps, all in one bin, at the ends, vast."""
    few = np.bincount(rng.integers(0, BINS, 9), minlength=BINS)
    clusters = np.zeros(BINS, np.int64)
    clusters[rng.integers(0, BINS, 40)] = rng.integers(1, 1000, 40)
    lone = np.bincount([int(rng.integers(BINS))], minlength=BINS) * 7
    ends = np.bincount([0, BINS - 1], minlength=BINS)
    vast = rng.integers(0, 2**50, BINS)
    steep = np.floor(1e6 * np.exp(-np.arange(BINS) / 20)).astype(np.int64)
    return [torch.from_numpy(c.astype(np.int64)) for c in (few, clusters, lone, ends, vast, steep)]


def least_error(counts: Tensor, num_levels: int) -> float:
    """The least ``expected_error`` of any levels at bins' centres, by dynamic programming."""
    v = np.concatenate([[0], (np.arange(BINS) + 0.5) / BINS, [1]])
    c = np.concatenate([[0], counts.numpy(), [0]]).astype(np.float64)
    s0, s1, s2 = (np.concatenate([[0], np.cumsum(c * v**power)]) for power in (0, 1, 2))
    a, b = v[:, None], v[None, :]
    between = [s[None, :-1] - s[1:, None] for s in (s0, s1, s2)]
    cost = (a + b) * between[1] - between[2] - a * b * between[0]
    cost[np.tril_indices(len(v))] = np.inf
    best = cost[0]
    for _ in range(num_levels - 2):
        best = (best[:, None] + cost).min(0)
    return float(best[-1]) / float(counts.sum())


@pytest.mark.parametrize("bits", LEARNED_BITS)
def test_fitted_levels_rise_from_0_to_1_and_are_never_worse(bits):
    rng = fresh()
    for counts in [gaussian_counts(rng), *odd_counts(rng)]:
        for levels in (uniform_levels(bits), some_levels(bits, rng)):
            found = fit(levels, counts)
            assert (found.dtype, found.shape) == (torch.float32, levels.shape)
            assert (found[0], found[-1]) == (0, 1)
            assert bool((found.diff() >= 0).all())
            assert expected_error(found, counts) <= expected_error(levels, counts)
            assert torch.equal(fit(found, counts), found), "a second fit moved the levels"


@pytest.mark.parametrize("bits", LEARNED_BITS)
def test_fitted_levels_are_within_a_hundredth_of_the_best_or_two_where_lopsided(bits):
    rng = fresh()
    lopsided = counts_of(torch.from_numpy(rng.exponential(1, 128_000).astype(np.float32)), 128)
    # Of 60 draws the worst were 0.5 % and, lopsided, 1.1 % above.
    bounds = (1.01, gaussian_counts(rng)), (1.01, gaussian_counts(rng, 1024)), (1.02, lopsided)
    for bound, counts in bounds:
        found = fit(uniform_levels(bits), counts)
        assert expected_error(found, counts) <= bound * least_error(counts, 2**bits)


def test_equal_counts_give_equal_levels_bit_for_bit_from_anywhere():
    rng = fresh()
    counts = gaussian_counts(rng)
    for bits in LEARNED_BITS:
        first = fit(uniform_levels(bits), counts)
        assert torch.equal(fit(uniform_levels(bits), counts.clone()), first)
        assert torch.equal(fit(some_levels(bits, rng), counts), first)
        assert bool((first[1:-1] * 2 * BINS % 2 == 1).all()), "a level is not at a bin's centre"


def test_known_counts_give_known_levels():
    """Two lone bins and two free levels: each takes one; one bin: its levels meet there."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    counts[[100, 700]] = torch.tensor([5, 9])
    places = [0.0, 100.5 / BINS, 700.5 / BINS, 1.0]
    assert fit(uniform_levels(2), counts).tolist() == places
    assert expected_error(fit(uniform_levels(2), counts), counts) == 0
    third, v = 1 / 3, 100.5 / BINS
    thirds = torch.tensor([0, third, 2 * third, 1])
    expected = 5 * v * (float(thirds[1]) - v) + 9 * (700.5 / BINS - float(thirds[2])) * (
        1 - 700.5 / BINS
    )
    assert expected_error(thirds, counts) == pytest.approx(expected / 14, rel=1e-12)


def test_without_counts_the_levels_stay():
    levels = some_levels(4, fresh())
    assert torch.equal(fit(levels, torch.zeros(BINS, dtype=torch.int64)), levels)


@pytest.mark.parametrize(
    ("bits", "bucket", "most"), [(3, 128, 0.87), (4, 128, 0.86), (3, 1024, 0.73), (4, 1024, 0.71)]
)
def test_fitting_takes_error_from_gaussian_buckets(bits, bucket, most):
    """Measured on the wire, on fresh values: the levels are fitted to others."""
    rng = fresh()
    levels = fit(uniform_levels(bits), gaussian_counts(rng, bucket))
    x = torch.from_numpy(rng.standard_normal(bucket * 1000).astype(np.float32))
    key = KEY._replace(seed=int(rng.integers(2**62)))
    errors = [
        send(x, bits, "stochastic", key=key, bucket=bucket, levels=own).values - x
        for own in (levels, uniform_levels(bits))
    ]
    assert float(errors[0].square().mean()) < most * float(errors[1].square().mean())


def test_uniform_levels_are_evenly_spaced():
    for bits in LEARNED_BITS:
        levels = uniform_levels(bits)
        assert levels.dtype == torch.float32
        assert (levels[0], levels[-1], levels.numel()) == (0, 1, 2**bits)
        gaps = [float(b) - float(a) for a, b in pairwise(levels)]
        assert gaps == pytest.approx([1 / (2**bits - 1)] * len(gaps), abs=1e-6)
