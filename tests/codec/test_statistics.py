"""The codec's promises about averages, each with the probability of a false alarm stated.

Bounds are Hoeffding's, exact for any distribution: the mean of N independent numbers that lie in an
interval of width w is off by more than w * sqrt(log(2 / p) / (2 N)) with probability below p. Every
test shares p = 1e-7 among all its comparisons (Bonferroni). Beside each promise its power
is shown: a quantizer that breaks the promise fails the same comparison.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.codec_wire import KEY, UNBIASED, fresh, send

BITS = range(2, 9)
FALSE_ALARM = 1e-7
NUM_KEYS = 20
BUCKETS = 1000  # a key
WIDTH = 16  # values a bucket
NUM = NUM_KEYS * BUCKETS


def hoeffding(num: int, comparisons: int, width: float = 1.0) -> float:
    return width * math.sqrt(math.log(2 * comparisons / FALSE_ALARM) / (2 * num))


def repeated_errors(x: Tensor, bits: int, how: str, seed: int, decode_step: int = 0) -> Tensor:
    """(decoded - x) / d of one bucket sent ``NUM`` times: [NUM, WIDTH], over ``NUM_KEYS`` keys."""
    d = (x.max() - x.min()).double() / (2**bits - 1)
    errors = []
    for step in range(NUM_KEYS):
        key = KEY._replace(seed=seed, step=step)
        other = key._replace(step=step + decode_step)
        sent = send(x.repeat(BUCKETS), bits, how, key=key, receiver_key=other, bucket=WIDTH)
        errors.append((sent.values.view(BUCKETS, WIDTH).double() - x.double()) / d)
    return torch.cat(errors)


def bucket(rng: np.random.Generator) -> Tensor:
    x = rng.standard_normal(WIDTH) * 10 ** rng.uniform(-6, 6)
    return torch.from_numpy(x.astype(np.float32))


def worst_bias(errors: Tensor) -> float:
    """Greatest mean error of a value, as a multiple of what unbiased rounding may show."""
    allowed = hoeffding(NUM, comparisons=WIDTH * len(BITS) * len(UNBIASED)) + 2.0**-16
    return float(errors.mean(0).abs().max()) / allowed


@pytest.mark.parametrize("how", UNBIASED)
@pytest.mark.parametrize("bits", BITS)
def test_every_value_of_a_bucket_is_unbiased(bits, how):
    """Each of 16 values, ends of the range included, over 20,000 roundings under 20 keys."""
    rng = fresh()
    errors = repeated_errors(bucket(rng), bits, how, seed=int(rng.integers(2**62)))
    assert worst_bias(errors) < 1


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_nearest_fails_the_test_of_bias(bits):
    assert worst_bias(repeated_errors(bucket(fresh()), bits, "nearest", seed=0)) > 5


def test_a_slightly_biased_quantizer_fails_the_test_of_bias():
    """A coin of 0.9 u in place of u shifts a value by at most 0.1 d, and is seen."""
    rng = fresh()
    x = torch.from_numpy(rng.uniform(0, 255, WIDTH))
    u = torch.from_numpy(rng.uniform(0, 1, (NUM, WIDTH)))
    assert worst_bias(torch.floor(x + u) - x) < 1
    assert worst_bias(torch.floor(x + 0.9 * u) - x) > 2
    r = torch.from_numpy(rng.uniform(-0.5, 0.5, (NUM, 1)))
    assert worst_bias(torch.round(x - r) + r - x) < 1
    assert worst_bias(torch.round(x - r) + r + 0.1 - x) > 2


@pytest.mark.parametrize("how", UNBIASED)
def test_a_bucket_with_zeros_is_unbiased_in_its_other_values(how):
    rng = fresh()
    x = bucket(rng)
    x[::4] = 0
    live = x != 0
    span = (x[live].max() - x[live].min()) / (x.max() - x.min())
    for bits in (2, 5, 8):
        errors = repeated_errors(x, bits, how, seed=int(rng.integers(2**62)))
        steps_dense, steps = 2**bits - 1, 2**bits - 2
        assert bool((errors[:, ~live] == 0).all())
        assert worst_bias(errors * steps / steps_dense / float(span)) < 1


def fresh_errors(bits: int, how: str, seed: int, rng: np.random.Generator, decode_step: int = 0):
    """(position in steps [NUM, WIDTH - 2], error in steps) of fresh values between fixed ends."""
    positions, errors = [], []
    low, high = -1.0, 1.0
    d = (high - low) / (2**bits - 1)
    for step in range(NUM_KEYS):
        x = rng.uniform(low, high, (BUCKETS, WIDTH)).astype(np.float32)
        x[:, 0], x[:, -1] = low, high
        key = KEY._replace(seed=seed, step=step)
        other = key._replace(step=step + decode_step)
        given = torch.from_numpy(x)
        sent = send(given.view(-1), bits, how, key=key, receiver_key=other, bucket=WIDTH)
        got = sent.values.view(BUCKETS, WIDTH).double().numpy()
        positions.append((x.astype(np.float64)[:, 1:-1] - low) / d)
        errors.append((got - x)[:, 1:-1] / d)
    return np.concatenate(positions), np.concatenate(errors)


MEAN_SQUARE = {"shift": 1 / 12, "dither": 1 / 12, "stochastic": 1 / 6, "nearest": 1 / 12}


@pytest.mark.parametrize("how", UNBIASED)
@pytest.mark.parametrize("bits", BITS)
def test_the_mean_squared_error_is_the_papers(bits, how):
    """d^2/12 (shift, dither), d^2/6 (stochastic), to 0.009 d^2 at most, over 20,000 buckets."""
    rng = fresh()
    _, errors = fresh_errors(bits, how, int(rng.integers(2**62)), rng)
    worst = 1.0 if how == "stochastic" else 0.25
    allowed = hoeffding(NUM, len(BITS) * len(UNBIASED), width=worst) + 2.0**-13
    if how == "stochastic":  # independent errors: every value counts, not only every bucket
        allowed = hoeffding(errors.size, len(BITS) * len(UNBIASED), width=worst) + 2.0**-13
    assert allowed < 0.009
    assert abs((errors**2).mean() - MEAN_SQUARE[how]) < allowed
    limit = 1.0 if how == "stochastic" else 0.5
    assert np.abs(errors).max() <= limit * (1 + 2.0**-12)


@pytest.mark.parametrize("how", ["shift", "dither"])
def test_decoding_with_another_key_fails_the_test_of_the_mean_squared_error(how):
    rng = fresh()
    _, errors = fresh_errors(5, how, int(rng.integers(2**62)), rng, decode_step=1)
    assert abs((errors**2).mean() - MEAN_SQUARE[how]) > 0.1


def dependence(positions: np.ndarray, errors: np.ndarray) -> float:
    """Greatest correlation of the error with the value or with other errors, in allowed units.

    A correlation of M independent pairs is near normal with variance 1/M; 7 standard deviations
    have probability 3e-12, which leaves 1e-7 for many thousand comparisons.
    """
    cell = 2 * np.pi * positions
    causes = [positions, np.sin(cell), np.cos(cell), np.sin(2 * cell), np.cos(2 * cell)]
    effects = [errors, errors**2]
    pairs = [(cause, effect) for cause in causes for effect in effects]
    pairs += [(errors[:, lag:], errors[:, :-lag]) for lag in range(1, 10)]
    pairs += [(errors[1:], errors[:-1]), (errors[BUCKETS:], errors[:-BUCKETS])]
    return max(
        abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * math.sqrt(a.size) / 7 for a, b in pairs
    )


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_dither_errors_are_independent_of_the_values_and_of_each_other(bits):
    """The error, and its square, have nothing to do with other quantities.

    These are the value, its place in its cell, nine neighbours, the next bucket and the next key.
    """
    rng = fresh()
    assert dependence(*fresh_errors(bits, "dither", int(rng.integers(2**62)), rng)) < 1


def test_dither_errors_are_uniform_over_a_step():
    rng = fresh()
    _, errors = fresh_errors(6, "dither", int(rng.integers(2**62)), rng)
    counts, _ = np.histogram(errors, bins=64, range=(-0.5, 0.5))
    assert counts.sum() > errors.size * 0.999
    allowed = hoeffding(errors.size, comparisons=64) + 2.0**-12
    assert np.abs(counts / errors.size - 1 / 64).max() < allowed


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_dependent_errors_fail_the_test_of_independence(how):
    """nearest's error follows from the value; a coin flip's variance depends on it."""
    rng = fresh()
    assert dependence(*fresh_errors(4, how, int(rng.integers(2**62)), rng)) > 5


@pytest.mark.parametrize(
    "field", ["step", "sender", "receiver", "stage", "direction", "occurrence"]
)
def test_errors_under_neighbouring_keys_are_uncorrelated(field):
    """Senders' errors average out in a reduce only if they are independent."""
    rng = fresh()
    x = torch.from_numpy(rng.standard_normal(200_000).astype(np.float32))
    key = KEY._replace(seed=int(rng.integers(2**62)))
    keys = [key, key._replace(**{field: getattr(key, field) + 1})]
    first, second = ((send(x, 4, "dither", key=k, bucket=1000).values - x).numpy() for k in keys)
    assert abs(np.corrcoef(first, second)[0, 1]) < 7 / math.sqrt(x.numel())
    again = (send(x, 4, "dither", key=keys[0], bucket=1000).values - x).numpy()
    assert np.array_equal(again, first)


def test_neighbouring_parameters_and_groups_draw_uncorrelated_errors():
    rng = fresh()
    x = torch.from_numpy(rng.standard_normal(200_000).astype(np.float32))
    numbers = [(5, 2), (6, 2), (5, 3), (2, 5)]
    errors = [
        (send(x, 4, "dither", bucket=1000, parameter=p, group=g).values - x).numpy()
        for p, g in numbers
    ]
    off_diagonal = np.abs(np.corrcoef(errors) - np.eye(len(errors)))
    assert off_diagonal.max() < 7 / math.sqrt(x.numel())
