"""The kernels that rotate gradients: what they must give, on every capability."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qsdp.common.dtypes import CODEC_DTYPES
from qsdp.ops import native
from qsdp.ops.reference.rotation import MOST_BLOCK, RotatedStretch, rotate, rotated
from tests.support import gpu_kernels
from tests.support.kernel_inputs import assert_canaries, hard_values, off_by

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE = [name for name in native.available() if name != native.PYTHON]


@pytest.fixture(params=[*NATIVE, *gpu_kernels.PARAMS])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every kernel in turn but the specification."""
    with gpu_kernels.serving(request.param):
        yield request.param


def rows_of(*stretches: tuple[int, int, int, torch.dtype]) -> Tensor:
    """A table of (byte, values, bucket, dtype)."""
    rows = [[*start, CODEC_DTYPES[dtype]] for *start, dtype in stretches]
    return torch.tensor(rows, dtype=torch.int64).view(-1, len(RotatedStretch))


def by_specification(buffer: Tensor, rows: Tensor) -> Tensor:
    expected = buffer.clone()
    rotate(expected, rows)
    return expected


def by_hand(values: list[float]) -> list[float]:
    """A block's transform in fp64, by its matrix, whose signs say how many bits i and j share."""
    size = len(values)
    signs = [(-1) ** _pairs(i) for i in range(size)]
    return [
        signs[i]
        * sum((-1) ** (i & j).bit_count() * signs[j] * values[j] for j in range(size))
        / size**0.5
        for i in range(size)
    ]


def _pairs(i: int) -> int:
    """How often two digits 1 of ``i`` are neighbours."""
    digits = f"{i:b}"
    return sum(a == b == "1" for a, b in pairwise(digits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_is_rotated_as_specified(
    capability: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Lengths of 0 to 600 values at all kinds of addresses, in buckets of several sizes."""
    stretches, byte = [], 3
    for numel in range(601):
        bucket = (256, 8, 24, 128, 1024, 264)[numel % 6]
        stretches.append((byte, numel, bucket, dtype))
        byte += numel * dtype.itemsize + (0, 5, 16)[numel % 3]
    buffer, whole = off_by(byte + 7, int(torch.randint(0, 16, (), generator=generator)))
    buffer.copy_(
        hard_values(byte // dtype.itemsize + 8, generator).to(dtype).view(torch.uint8)[: byte + 7]
    )
    rows = rows_of(*stretches)
    expected = by_specification(buffer, rows)
    torch.ops.qsdp.rotate(buffer, rows)
    assert torch.equal(buffer, expected)
    assert_canaries(whole, buffer)


def test_threads_share_the_rotation(capability: str, generator: torch.Generator) -> None:
    values = torch.randn(300_001, generator=generator)
    rows = rows_of(
        (0, 100_003, 4096, torch.float32),
        (400_012, 0, 8, torch.float32),
        (400_012, 199_990, 256, torch.float32),
    )
    buffer = values.view(torch.uint8)
    expected = by_specification(buffer, rows)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.ops.qsdp.rotate(buffer, rows)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize(
    ("numel", "blocks"), [(256, [256]), (37, [32, 4, 1]), (300, [256, 32, 8, 4])]
)
def test_the_specification_multiplies_each_block_by_its_matrix(
    numel: int, blocks: list[int], generator: torch.Generator
) -> None:
    values = torch.randn(numel, generator=generator)
    expected = [each for part in values.split(blocks) for each in by_hand(part.tolist())]
    found = rotated(values, 1024)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=3e-6)


def test_a_bucket_that_is_no_power_of_two_is_cut_by_itself(generator: torch.Generator) -> None:
    values = torch.randn(60, generator=generator)
    apart = [rotated(part, 1024) for part in values.split([16, 8] * 2 + [8, 4])]
    assert torch.equal(rotated(values, 24), torch.cat(apart))


def test_rotating_twice_gives_back_what_was_there(generator: torch.Generator) -> None:
    values = torch.randn(5000, generator=generator)
    once = rotated(values, 256)
    assert float((once - values).abs().max()) > 1
    torch.testing.assert_close(once.square().sum(), values.square().sum())
    torch.testing.assert_close(rotated(once, 256), values, rtol=0, atol=5e-6)


def test_what_neighbours_have_in_common_is_spread_evenly() -> None:
    """The signs are bent: every row of the Hadamard matrix becomes 1 and -1 alone."""
    one = torch.zeros(MOST_BLOCK, MOST_BLOCK)
    rows = one.fill_diagonal_(1.0)
    h = 1
    while h < MOST_BLOCK:
        first, second = rows.view(MOST_BLOCK, -1, 2, h).unbind(2)
        rows = torch.stack([first + second, first - second], 2).reshape(MOST_BLOCK, MOST_BLOCK)
        h *= 2
    found = rotated(rows.flatten(), MOST_BLOCK)
    assert torch.equal(found.abs(), torch.ones(MOST_BLOCK**2))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_block_with_what_is_not_finite_is_not_finite(odd: float) -> None:
    values = torch.ones(3 * MOST_BLOCK)
    values[MOST_BLOCK + 5] = values[MOST_BLOCK + 9] = odd
    finite = rotated(values, 4 * MOST_BLOCK).view(3, -1).isfinite().sum(1).tolist()
    assert finite[::2] == [MOST_BLOCK] * 2
    assert finite[1] == 0 or (odd == 3e38 and finite[1] < MOST_BLOCK)


def test_opcheck_of_the_rotation_passes(capability: str) -> None:
    given = torch.randn(100).view(torch.uint8), rows_of((0, 90, 32, torch.float32))
    torch.library.opcheck(torch.ops.qsdp.rotate.default, given)


@pytest.mark.parametrize("served_by", native.available())
@pytest.mark.parametrize(
    ("buffer", "rows", "told"),
    [
        (torch.zeros(64), [[0, 4, 8, 0]], "give a contiguous 1-D uint8 view"),
        (torch.zeros(128, dtype=torch.uint8)[::2], [[0, 4, 8, 0]], "contiguous 1-D uint8 view"),
        (None, [[0, 4, 8]], "stretches have 3 columns: give 4"),
        (None, [0, 4, 8, 0], "give (contiguous )?int64 rows on the cpu"),
        (None, [[0, 4, 8, 3]], "DTYPE 3 and buckets of 8: give 0 to 2"),
        (None, [[0, 4, 8, -1]], "DTYPE -1 and buckets of 8: give 0 to 2"),
        (None, [[0, 4, 12, 0]], "buckets of 12: give 0 to 2 and a positive multiple of 8"),
        (None, [[0, 4, 0, 0]], "buckets of 0: give 0 to 2 and a positive multiple of 8"),
        (None, [[0, 17, 8, 0]], "stretch of 17 values at byte 0 reaches outside the buffer"),
        (None, [[-4, 4, 8, 0]], "stretch of 4 values at byte -4 reaches outside the buffer"),
        (None, [[0, -4, 8, 0]], "stretch of -4 values at byte 0 reaches outside the buffer"),
        (None, [[0, 1 << 62, 8, 0]], "reaches outside the buffer"),
        (None, [[0, 8, 8, 1], [12, 4, 8, 0]], "at byte 12 reaches .* into the one before"),
    ],
)
def test_rotating_refuses(
    served_by: str, buffer: Tensor | None, rows: list[list[int]], told: str
) -> None:
    given = torch.zeros(64, dtype=torch.uint8) if buffer is None else buffer
    with gpu_kernels.serving(served_by), pytest.raises(ValueError, match=told):
        torch.ops.qsdp.rotate(given, torch.tensor(rows))
