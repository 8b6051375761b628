"""The codec's promises about values that hold for every key: exact zeros and constants, bounds.

The promises about averages are in test_statistics.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qsdp.config import ROUNDINGS
from tests.support import codec_reference as reference
from tests.support.codec_wire import DTYPES, KEY, LARGEST, fresh, send

BITS = range(2, 9)
TINY = 2.0**-126


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("bits", BITS)
def test_exact_zeros_of_both_signs_stay_plus_zero_and_only_they(bits, how, dtype):
    rng = fresh()
    bucket = 32
    scales = np.array([1, 1, 1, 1, 1, 1e-3, 1e3, 1], np.float32)[:, None]
    x = (rng.standard_normal((8, bucket)).astype(np.float32) * scales).clip(-6e4, 6e4)
    x += np.where(x == 0, np.float32(1), np.float32(0))
    zeros = rng.random((8, bucket)) < 0.4
    zeros[1], zeros[2], zeros[3] = True, False, False
    zeros[2, rng.integers(bucket)] = True
    zeros[4], zeros[7] = True, False
    zeros[4, rng.integers(bucket)] = False
    x = np.where(zeros, np.where(rng.random((8, bucket)) < 0.5, 0.0, -0.0), x).astype(np.float32)
    x[1] = 0.0 if rng.random() < 0.5 else -0.0
    x[6] = np.where(zeros[6], x[6], np.abs(x[6]) + 1)  # all positive beside the zeros
    given = torch.from_numpy(x).to(dtype)
    zeros = given == 0
    got = send(given.view(-1), bits, how, bucket=bucket).values.view(8, bucket)
    assert bool((got[zeros] == 0).all())
    assert not bool(got[zeros].signbit().any())
    assert bool((got[4][~zeros[4]] == given[4][~zeros[4]]).all()), "a lone value is not exact"
    assert bool((got[6][~zeros[6]] > -got[6].max()).all())
    exact = given.double()
    span = exact.masked_fill(zeros, -torch.inf).amax(1) - exact.masked_fill(zeros, torch.inf).amin(
        1
    )
    span = span.clamp(min=0)  # an all-zero bucket spans nothing
    steps = torch.where(zeros.any(1), 2**bits - 2, 2**bits - 1)
    d = (span / steps)[:, None]
    bound = (1.0 if how == "stochastic" else 0.5) * d * 1.001
    bound = bound + 2 * torch.finfo(dtype).eps * (exact.abs() + d)
    assert bool(((got.double() - exact).abs() <= bound)[~zeros].all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ROUNDINGS)
def test_an_all_equal_bucket_is_exact_alone_and_beside_zeros(how, dtype):
    info = torch.finfo(dtype)
    least = torch.tensor([1], dtype=torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype)
    constants = [info.max, info.min, info.tiny, -info.tiny, least.item(), 1 / 3, -1.7, 1e-3]
    x = torch.tensor(constants, dtype=dtype)[:, None].repeat(1, 32)
    beside = x.clone()
    beside[:, ::3] = 0
    for bits in BITS:
        for given in (x, beside):
            got = send(given.reshape(-1), bits, how, bucket=32).values.view_as(given)
            assert torch.equal(got.view(torch.uint8), given.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ROUNDINGS)
def test_a_bucket_with_a_nan_or_an_inf_decodes_to_nan_and_no_other_does(how, dtype):
    rng = fresh()
    for bits in BITS:
        x = torch.from_numpy(rng.standard_normal((9, 16)).astype(np.float32)).to(dtype)
        x[6, ::2] = 0
        healthy = x.clone()
        for row, bad in ((1, torch.nan), (3, torch.inf), (5, -torch.inf), (6, torch.nan)):
            x[row, int(rng.integers(16))] = bad
        x[7] = torch.inf
        got = send(x.view(-1), bits, how, bucket=16).values.view_as(x)
        broken = torch.tensor([1, 3, 5, 6, 7])
        whole = torch.tensor([0, 2, 4, 8])
        assert bool(got[broken].isnan().all())
        expected = send(healthy.view(-1), bits, how, bucket=16).values.view_as(x)
        assert torch.equal(got[whole], expected[whole])
        assert bool(got[whole].isfinite().all())


@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("bits", BITS)
def test_errors_are_bounded_by_the_step_at_every_magnitude(bits, how):
    """shift, dither, nearest: d/2; stochastic: d; and two fp32 roundings of the largest value."""
    rng = fresh()
    exponents = np.concatenate([np.arange(-100, 128, 4), [119, 120, 121, 122, 127, 127, 127]])
    rows = []
    for exponent in exponents:
        scale = np.float64(2.0**exponent)
        for row in (
            rng.uniform(-1, 1, 24),
            rng.uniform(0.9, 1, 24),
            -rng.uniform(0.9999, 1, 24),
            np.array([-1.0, 1.0] * 12),
            rng.uniform(-1, 1, 24) ** 9,
        ):
            rows.append(row * scale * 1.9999999)
    rows.append(np.array([-LARGEST, LARGEST] * 12))
    rows.append(np.array([-LARGEST, LARGEST, 0.0] * 8))
    rows.append(rng.uniform(-LARGEST, LARGEST, 24))
    x = torch.from_numpy(np.stack(rows).clip(-LARGEST, LARGEST).astype(np.float32))
    got = send(x.view(-1), bits, how, bucket=24).values.view_as(x).double()
    x = x.double()
    assert bool(got.isfinite().all())
    steps = torch.where((x == 0).any(1), 2**bits - 2, 2**bits - 1)
    d = ((x.amax(1) - x.amin(1)) / steps)[:, None]
    largest = x.abs().amax(1)[:, None]
    bound = (1.0 if how == "stochastic" else 0.5) * d * (1 + 2.0**-12) + 2.0**-22 * largest
    excess = (got - x).abs() / bound
    assert float(excess.max()) <= 1, f"error is {float(excess.max())} of the bound"


@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("bits", BITS)
def test_a_bucket_narrower_than_normal_steps_loses_less_than_its_span(bits, how):
    rng = fresh()
    span = np.float32(TINY) * (2**bits - 1)
    x = (rng.uniform(0, 1, (40, 16)) * span * rng.uniform(0, 1.2, (40, 1))).astype(np.float32)
    x[::2] -= span / 2
    got = send(torch.from_numpy(x).view(-1), bits, how, bucket=16).values.view(40, 16).numpy()
    assert np.isfinite(got).all()
    width = x.max(1, keepdims=True) - x.min(1, keepdims=True)
    assert (np.abs(got.astype(np.float64) - x) <= width * 1.001).all()
    assert (got[x == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ROUNDINGS)
def test_values_at_the_edge_of_a_narrow_dtype_stay_finite(how, dtype):
    rng = fresh()
    limit = torch.finfo(dtype).max
    for bits in BITS:
        x = torch.from_numpy(rng.uniform(-1, 1, (200, 8))).mul(limit).to(dtype)
        x = x.clamp(-limit, limit)
        x[:, 0], x[:, 1] = limit, -limit
        x[::2] = x[::2].abs().clamp(min=limit / 2)
        got = send(x.view(-1), bits, how, bucket=8).values.view_as(x)
        assert bool(got.isfinite().all())
        error = (got.double() - x.double()).abs()
        d = (x.double().amax(1) - x.double().amin(1)) / (2**bits - 2)
        assert bool((error <= d[:, None] * 1.01 + limit * torch.finfo(dtype).eps).all())


@pytest.fixture(scope="module")
def extreme_parameters() -> list[int]:
    """Parameter numbers whose first eight half words hold 0 (r least) or 65535 (r greatest)."""
    found: dict[int, list[int]] = {0: [], 65535: []}
    key, parameter = reference.fold(KEY), 0
    while min(map(len, found.values())) < 2:
        drawn = list(reference.half_words(8, parameter, 2, key))
        for extreme, parameters in found.items():
            if extreme in drawn:
                parameters.append(parameter)
        parameter += 1
    return found[0] + found[65535]


@pytest.mark.parametrize("zeros", [False, True], ids=["dense", "zeros"])
@pytest.mark.parametrize("how", ["shift", "dither", "stochastic"])
@pytest.mark.parametrize("bits", BITS)
def test_a_code_that_overflows_is_clamped_and_never_wraps(bits, how, zeros, extreme_parameters):
    """Buckets made so that rounding carries the greatest value one past its last code.

    A wrapped code would decode the maximum as the minimum, or (beside zeros) as 0.
    """
    rng = fresh()
    steps = 2**bits - (2 if zeros else 1)
    pairs = []
    for _ in range(4000):  # the greatest value lies above ``steps`` by a rounding error
        low, high = (np.sort(rng.standard_normal(2)) + 100).astype(np.float32)
        d = np.float32(high / np.float32(steps)) - np.float32(low / np.float32(steps))
        above = float(reference.position(high, low, d)) - steps if d > 0 else -1.0
        if above >= 2.0**-16 or (steps == 2 and above >= 0):
            pairs.append((low, high, d))
        if len(pairs) == 4:
            break
    overflows = 0
    for parameter in extreme_parameters:
        drawn = reference.uniforms(8, parameter, 2, reference.fold(KEY))
        for low, high, d in pairs:
            # shift: eight buckets of eight, r a bucket; else one bucket of eight, r a value.
            x = np.full((8, 8) if how == "shift" else (1, 8), high, np.float32)
            for row in x:
                row[0] = low
            if zeros:
                x[:, 1] = 0
            for spot in np.ndindex(x.shape):
                code = reference.unclamped_code(
                    x[spot], low, d, drawn[spot[0] if how == "shift" else spot[1]], how
                )
                overflows += code > steps and x[spot] == high
            given = torch.from_numpy(x)
            sent = send(given.view(-1), bits, how, bucket=8, parameter=parameter)
            error = (sent.values.view_as(given) - given).abs().max()
            step = float(high - low) / steps
            limit = step * (1.001 if how == "stochastic" else 0.501) + 2.0**-22 * float(high)
            assert error <= limit
            codes = np.reshape(reference.unpack(sent.codes, bits, x.size), x.shape)
            assert (codes[x != 0] <= steps).all()
    # Halving is exact: with two steps nothing can overflow.
    assert overflows > 0 or steps == 2, "no bucket overflowed: the test proved nothing"
