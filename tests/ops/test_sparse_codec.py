"""Compact and expand: every kernel against the specification, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qsdp.common import bitmask
from qsdp.ops import native
from qsdp.ops.reference import sparse
from tests.support import gpu_kernels

KERNELS = (sparse, torch.ops.qsdp)
_ON_CPU = dict.fromkeys((native.available()[0], native.PYTHON))


def _case(numel: int, dtype: torch.dtype, density: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dense bytes, spans, bitmap, mask): one masked segment between two whole ones."""
    torch.manual_seed(numel)
    mask = torch.rand(numel) < density
    values = (torch.randn(numel + 8) * 50).to(dtype)
    values[3 : 3 + numel] *= mask
    values[3 : 3 + numel].masked_fill_(~mask, 0)
    item, count = dtype.itemsize, int(mask.sum())
    rows = [
        [0, 3, item, -1, 0, 3],
        [3 * item, numel, item, 1, 3 * item, count],
        [(3 + numel) * item, 5, item, -1, (3 + count) * item, 5],
    ]
    bitmap = torch.cat([torch.tensor([255], dtype=torch.uint8), bitmask.pack(mask)])
    return values.view(torch.uint8), torch.tensor(rows), bitmap, mask


@pytest.fixture(params=[*_ON_CPU, *gpu_kernels.PARAMS])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every kernel in turn: one C++ text serves all instruction sets."""
    with gpu_kernels.serving(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 64, 1001, 1024, 1025, 5000])
def test_all_kernels_give_the_values_kept_and_put_them_back(
    capability: str, numel: int, density: float, dtype: torch.dtype
) -> None:
    check(*_case(numel, dtype, density), dtype)


def test_a_long_span(capability: str) -> None:
    """More units than a warp of a GPU sums in one go."""
    check(*_case(270_001, torch.bfloat16, 0.1), torch.bfloat16)


def test_many_spans(capability: str) -> None:
    """More than one launch takes on a GPU."""
    torch.manual_seed(0)
    masks = [torch.rand(17 * i % 50) < 0.4 for i in range(150)]
    dense, expected, rows, bits = [], [], [], []
    for mask in masks:
        values = torch.randn(mask.numel()).masked_fill_(~mask, 0)
        start, kept = (4 * sum(part.numel() for part in parts) for parts in (dense, expected))
        byte = sum(part.numel() for part in bits)
        rows.append([start, mask.numel(), 4, byte, kept, int(mask.sum())])
        dense.append(values)
        expected.append(values[mask])
        bits.append(bitmask.pack(mask))
    out = torch.full_like(torch.cat(expected), 7)
    given, spans, bitmap = torch.cat(dense).view(torch.uint8), torch.tensor(rows), torch.cat(bits)
    torch.ops.qsdp.compact(given, spans, bitmap, out.view(torch.uint8), True)
    assert torch.equal(out, torch.cat(expected))
    back = torch.full_like(given, 9)
    torch.ops.qsdp.expand(out.view(torch.uint8), spans, bitmap, back)
    assert torch.equal(back, given)


def check(dense: Tensor, spans: Tensor, bitmap: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
    """``_case`` compacted and put back."""
    values = dense.view(dtype)
    expected = torch.cat([values[:3], values[3:-5][mask], values[-5:]])
    out = torch.full_like(expected, 7)
    torch.ops.qsdp.compact(dense, spans, bitmap, out.view(torch.uint8), True)
    assert torch.equal(out, expected)
    back = torch.full_like(dense, 9)
    torch.ops.qsdp.expand(out.view(torch.uint8), spans, bitmap, back)
    assert torch.equal(back, dense)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_stray_value_is_an_error_where_it_must_be_zero(kernels: object) -> None:
    dense, spans, bitmap, mask = _case(1001, torch.float32, 0.5)
    place = 3 + int((~mask).nonzero()[-1])
    dense.view(torch.float32)[place] = 1e-30
    out = torch.empty(4 * (8 + int(mask.sum())), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="outside the mask is not zero"):
        kernels.compact(dense, spans, bitmap, out, True)  # type: ignore[attr-defined]
    kernels.compact(dense, spans, bitmap, out, False)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        *((1, 0, 1 << 40), (1, 0, -1), (1, 1, 1 << 61), (1, 2, 3), (1, 3, 500), (1, 3, -2)),
        *((1, 4, 1 << 50), (1, 5, 0), (1, 5, -1), (0, 5, 2), (2, 1, 6)),
    ],
)
def test_spans_that_reach_outside_are_refused(
    kernels: object, row: int, column: int, value: int
) -> None:
    dense, spans, bitmap, mask = _case(1001, torch.float32, 0.5)
    spans[row, column] = value
    out = torch.empty(4 * (8 + int(mask.sum())), dtype=torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match="reaches outside"):
        kernels.compact(dense, spans, bitmap, out, False)  # type: ignore[attr-defined]
    with pytest.raises((ValueError, RuntimeError), match="reaches outside"):
        kernels.expand(out, spans, bitmap, dense)  # type: ignore[attr-defined]


def test_packed_masks_come_back_and_are_counted() -> None:
    for numel in (0, 1, 8, 9, 1001):
        mask = torch.rand(numel) < 0.3
        bits = bitmask.pack(mask)
        assert bits.numel() == -(-numel // 8)
        assert torch.equal(bitmask.unpack(bits, numel), mask)
        assert bitmask.count(bits[None]).tolist() == [int(mask.sum())]
