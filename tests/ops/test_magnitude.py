"""The kernels that count and compare magnitudes: what they must give, on every capability."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qsdp.ops import native
from qsdp.ops.reference import magnitude
from qsdp.ops.reference.magnitude import DTYPES, NUM_BINS
from tests.support import gpu_kernels

ROUNDS = [(20, 11), (9, 11), (0, 9)]  # those of a threshold over floats
EVERY_DTYPE = (*DTYPES, torch.int64)


@pytest.fixture(params=[*native.available(), pytest.param("cuda", marks=pytest.mark.gpu)])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every kernel in turn, the specification among them."""
    with gpu_kernels.serving(request.param):
        yield request.param


def values_of(dtype: torch.dtype, num: int, seed: int = 0) -> Tensor:
    """Values with ties, zeros, both signs and, for floats, everything that is not finite."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int64:
        bound = torch.randint(1, 63, (num,), generator=generator)
        return torch.randint(1 << 62, (num,), generator=generator) >> bound
    values = torch.randn(num, generator=generator) * 10.0 ** torch.randint(
        -12, 12, (num,), generator=generator
    )
    special = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-40]
    for i, value in enumerate(special):
        values[i :: 7 * len(special)] = value
    return values.to(dtype)


def keys_by_hand(values: Tensor) -> list[int]:
    if values.dtype == torch.int64:
        return values.tolist()
    return [bits & 0x7FFFFFFF for bits in values.float().view(torch.int32).tolist()]


def counts_by_hand(keys: list[int], prefix: int, shift: int, width: int) -> list[int]:
    counts = [0] * NUM_BINS
    for key in keys:
        if key >> (shift + width) == prefix:
            counts[key >> shift & ((1 << width) - 1)] += 1
    return counts


def count(values: Tensor, prefix: int, shift: int, width: int) -> Tensor:
    counts = torch.full((NUM_BINS,), 5)
    torch.ops.qsdp.count_digits(values, torch.tensor(prefix), shift, width, counts)
    return counts - 5  # it adds


def mark(values: Tensor, key: int) -> Tensor:
    out = torch.ones(values.shape, dtype=torch.bool)
    torch.ops.qsdp.mark_above(values, key, out)
    return out


@pytest.mark.parametrize("num", [0, 1, 15, 16, 17, 1000, 5003])
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_digits_are_counted(capability: str, dtype: torch.dtype, num: int) -> None:
    values = values_of(dtype, num)
    keys = keys_by_hand(values)
    ways = [*ROUNDS, (0, 1), (3, 7), (30, 1), (25, 11), (31, 4), (40, 11), (52, 11), (62, 1)]
    for shift, width in ways:
        common = keys[num // 2] >> (shift + width) if num else 0
        for prefix in {0, common, common + 1, -1, 1 << 40}:
            assert count(values, prefix, shift, width).tolist() == counts_by_hand(
                keys, prefix, shift, width
            ), (shift, width, prefix)


@pytest.mark.parametrize("num", [0, 1, 17, 5003])
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_marks_are_those_above(capability: str, dtype: torch.dtype, num: int) -> None:
    values = values_of(dtype, num)
    keys = keys_by_hand(values)
    ends = [-1, 0, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1]
    for key in [*ends, *keys[:20], *(key - 1 for key in keys[:20])]:
        assert mark(values, key).tolist() == [own > key for own in keys], key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half(capability: str, dtype: torch.dtype) -> None:
    values = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    keys = keys_by_hand(values)
    for shift, width in ROUNDS:
        for prefix in {key >> (shift + width) for key in keys[::4001]}:
            assert count(values, prefix, shift, width).tolist() == counts_by_hand(
                keys, prefix, shift, width
            )
    for key in keys[::509]:
        assert mark(values, key).tolist() == [own > key for own in keys]


def test_threads_share_the_counting(capability: str) -> None:
    values = values_of(torch.float32, 700_001)
    wanted = torch.bincount(magnitude.keys_of(values).long() >> 20, minlength=NUM_BINS)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(count(values, 0, 20, 11), wanted)
        assert torch.equal(mark(values, 1 << 29), magnitude.keys_of(values) > 1 << 29)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"values": torch.zeros(4, dtype=torch.float64)}, "give contiguous 1-D fp32"),
        ({"values": torch.zeros(2, 2)}, "give contiguous 1-D fp32"),
        ({"values": torch.zeros(8)[::2]}, "give contiguous 1-D fp32"),
        ({"shift": -1}, "cannot count 11 bits from bit -1 on"),
        ({"shift": 53}, "cannot count 11 bits from bit 53 on"),
        ({"width": 0}, "cannot count 0 bits"),
        ({"width": 12}, "cannot count 12 bits"),
        ({"prefix": torch.zeros(2, dtype=torch.int64)}, "give one int64"),
        ({"prefix": torch.tensor(0)[None].int()}, "give one int64"),
        ({"counts": torch.zeros(2047, dtype=torch.int64)}, "give contiguous int64"),
        ({"counts": torch.zeros(2048)}, "give contiguous int64"),
        ({"counts": torch.zeros(4096, dtype=torch.int64)[::2]}, "give contiguous int64"),
    ],
)
def test_counting_refuses(capability: str, change: dict[str, object], told: str) -> None:
    arguments: dict[str, object] = {
        "values": torch.zeros(4),
        "prefix": torch.tensor(0),
        "shift": 20,
        "width": 11,
        "counts": torch.zeros(NUM_BINS, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=told):
        torch.ops.qsdp.count_digits(*(arguments | change).values())


@pytest.mark.parametrize(
    ("values", "out", "told"),
    [
        (torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.bool), "values are"),
        (torch.zeros(4), torch.zeros(3, dtype=torch.bool), "marks are"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.uint8), "marks are"),
        (torch.zeros(4), torch.zeros(8, dtype=torch.bool)[::2], "marks are"),
    ],
)
def test_marking_refuses(capability: str, values: Tensor, out: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        torch.ops.qsdp.mark_above(values, 0, out)
