"""Many payloads in one call: what single calls give, part after part, whoever shares the work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qsdp.codec.payload import Layout, Segment
from qsdp.codec.segment_table import Field, Part
from qsdp.common.dtypes import TORCH_DTYPES, DType
from qsdp.common.rounding import Rounding
from qsdp.ops import native
from qsdp.ops.reference import codec
from tests.support import gpu_kernels
from tests.support.codec_wire import segments_of_sizes

HEADER = [1, 2, 3, 4]
CANARY = 0xC5
FLOATS = (DType.FP32, DType.BF16, DType.FP16)
FIRST_LEVEL = 7
COMPILED = [name for name in native.available() if name != native.PYTHON]


@pytest.fixture(params=[*native.available(), *gpu_kernels.PARAMS])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with gpu_kernels.serving(request.param):
        yield request.param


def some(below: int, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=generator)


def mixed_layout(generator: torch.Generator, floats: tuple[DType, ...] = FLOATS) -> Layout:
    """Each rounding, with learned levels and without, at some bits and sizes; and raw segments."""
    kinds = [(rounding, False) for rounding in Rounding]
    kinds += [(rounding, True) for rounding in Rounding if rounding.properties.has_levels]
    segments = []
    for dtype in floats:
        for rounding, learned in kinds:
            bits = int(some(5 if learned else 7, generator)) + 2
            segments.append(
                Segment(
                    bits=bits,
                    dtype=dtype,
                    padded=int(some(200, generator)),
                    parameter=len(segments),
                    bucket=(8, 40, 64)[len(segments) % 3],
                    rounding=rounding,
                    levels=FIRST_LEVEL if learned else -1,
                )
            )
        wire = floats[len(segments) % len(floats)]
        segments.append(Segment(bits=0, dtype=dtype, padded=21, parameter=0, wire=wire))
    return Layout(segments, group=7)


def tables_of(layout: Layout, dtype: DType | None = None) -> Tensor:
    """Three kinds: all values are valid, two thirds, or none. Not contiguous."""
    shares = [[s.padded * share // 3 for s in layout.segments] for share in (3, 2, 0)]
    tables = torch.tensor([layout.table(numels, dtype) for numels in shares])
    return tables.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def random_values(layout: Layout, rows: int, generator: torch.Generator) -> Tensor:
    """uint8 [rows, bytes + 3]: finite values, some of them zero, and three bytes of no segment."""
    whole = []
    for _ in range(rows):
        parts = []
        for segment in layout.segments:
            x = torch.randn(segment.padded, generator=generator)
            x[torch.rand(segment.padded, generator=generator) < 0.1] = 0.0
            parts.append(x.to(TORCH_DTYPES[segment.dtype]).view(torch.uint8))
        whole.append(torch.cat([*parts, torch.zeros(3, dtype=torch.uint8)]))
    return torch.stack(whole)


def some_parts(num: int, rows: int, generator: torch.Generator, add: bool = False) -> Tensor:
    """int64 [num, len(Part)] that name three tables and two times ``rows`` rows; not contiguous."""
    parts = torch.empty(len(Part), num, dtype=torch.int64).T
    parts[:, Part.KEY] = some(2**62, generator, num) - 2**61
    parts[:, Part.TABLE] = some(3, generator, num)
    parts[:, Part.BUFFER] = some(rows, generator, num)
    parts[:, Part.PAYLOAD] = some(rows, generator, num)
    parts[:, Part.ADD] = some(2, generator, num) * add
    return parts


def off_by(rows: int, num_bytes: int, offset: int) -> tuple[Tensor, Tensor]:
    """uint8 [rows, num_bytes] of canaries at an odd address inside canaries, and the whole."""
    whole = torch.full((rows * num_bytes + 128,), CANARY, dtype=torch.uint8)
    return whole[64 + offset : 64 + offset + rows * num_bytes].view(rows, num_bytes), whole


def encode_each(
    buffers: Tensor, tables: Tensor, parts: Tensor, payloads: Tensor, levels: Tensor | None
) -> None:
    for key, table, row, payload, _ in parts.tolist():
        codec.encode(buffers[row], tables[table], key, HEADER, payloads[payload], levels)


def decode_each(
    payloads: Tensor, tables: Tensor, parts: Tensor, buffers: Tensor, levels: Tensor | None = None
) -> None:
    for key, table, row, payload, add in parts.tolist():
        codec.decode(payloads[payload], tables[table], key, buffers[row], bool(add), levels)


def test_one_call_is_the_single_calls_in_order(kernels: str, generator: torch.Generator) -> None:
    """With rows that several parts write, and rows that none does."""
    layout = mixed_layout(generator)
    levels = torch.rand(FIRST_LEVEL + 64, generator=generator).sort().values
    tables, parts = tables_of(layout), some_parts(9, 5, generator)
    parts[-3:, Part.PAYLOAD] = torch.tensor([1, 1, 2])
    parts[-3:-1, Part.TABLE] = 1
    buffers = random_values(layout, 5, generator)
    got, whole = off_by(6, layout.payload_bytes + 5, 1)
    want, want_whole = off_by(6, layout.payload_bytes + 5, 1)
    torch.ops.qsdp.encode_all(buffers, tables, parts, HEADER, got, levels)
    encode_each(buffers, tables, parts, want, levels)
    assert torch.equal(whole, want_whole)
    assert (want[5] == CANARY).all()

    all_rows = torch.arange(5)
    full = torch.stack([all_rows + 9, 0 * all_rows, all_rows, all_rows, 0 * all_rows], 1)
    torch.ops.qsdp.encode_all(buffers, tables, full, HEADER, got, levels)
    payloads = got[:5].clone()
    for dtype in (None, DType.FP32):
        tables = tables_of(layout, dtype)
        parts = some_parts(12, 4, generator, add=dtype is not None)
        parts[-3:, Part.BUFFER] = torch.tensor([1, 1, 2])
        parts[-3:-1, Part.TABLE] = 1
        row_bytes = layout.buffer_bytes if dtype is None else 4 * layout.num_values
        got, whole = off_by(5, row_bytes + 3, 3)
        want, want_whole = off_by(5, row_bytes + 3, 3)
        torch.ops.qsdp.decode_all(payloads, tables, parts, got, levels)
        decode_each(payloads, tables, parts, want, levels)
        assert torch.equal(whole, want_whole)
        assert (want[4] == CANARY).all()


def test_sums_are_of_the_order_of_the_parts(kernels: str, generator: torch.Generator) -> None:
    layout = mixed_layout(generator, (DType.FP32,))
    levels = torch.rand(FIRST_LEVEL + 64, generator=generator).sort().values
    tables, buffers = tables_of(layout), random_values(layout, 6, generator)
    rows = torch.arange(6)
    parts = torch.stack([rows, 0 * rows, rows, rows, 0 * rows], 1)
    payloads = torch.zeros(6, layout.payload_bytes, dtype=torch.uint8)
    torch.ops.qsdp.encode_all(buffers, tables, parts, HEADER, payloads, levels)
    parts[:, Part.BUFFER] = 0
    parts[1:, Part.ADD] = 1
    sums = []
    for order in (rows, rows.flip(0)):
        parts[:, Part.PAYLOAD] = parts[:, Part.KEY] = order
        got, want = torch.full((2, 1, layout.buffer_bytes), CANARY, dtype=torch.uint8)
        torch.ops.qsdp.decode_all(payloads, tables, parts, got, levels)
        decode_each(payloads, tables, parts, want, levels)
        assert torch.equal(got, want)
        sums.append(got)
    assert not torch.equal(*sums)


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
def test_threads_change_no_bytes(kernels: str, generator: torch.Generator) -> None:
    """Small parts and large ones, alone in their row or several in it, by one table or others."""
    segments = segments_of_sizes({8: 30_001, 3: 5, 4: 61_000})
    segments.append(Segment(bits=0, dtype=DType.FP32, padded=9_999, parameter=9, wire=DType.BF16))
    layout = Layout(segments, group=1)
    tables, parts = tables_of(layout), some_parts(10, 4, generator, add=True)
    parts[:, Part.BUFFER] = torch.tensor([0, 1, 2, 2, 2, 3, 3, 1, 1, 0])
    parts[:, Part.TABLE] = torch.tensor([0, 1, 0, 0, 0, 1, 0, 2, 1, 1])
    sent = parts.clone()
    sent[:, Part.ADD] = 0
    buffers = torch.randn(4, layout.num_values, generator=generator).view(torch.uint8)
    threads, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            payloads = torch.full((4, layout.payload_bytes), CANARY, dtype=torch.uint8)
            torch.ops.qsdp.encode_all(buffers, tables, sent, HEADER, payloads)
            values = torch.ones(4, layout.num_values).view(torch.uint8)
            torch.ops.qsdp.decode_all(payloads, tables, parts, values)
            results.append((payloads, values))
    finally:
        torch.set_num_threads(threads)
    for payloads, values in results[1:]:
        assert torch.equal(payloads, results[0][0])
        assert torch.equal(values, results[0][1])


def test_calls_with_nothing_to_do_do_nothing(kernels: str) -> None:
    buffers, payloads = torch.ones(3, 0, dtype=torch.uint8), torch.ones(2, 40, dtype=torch.uint8)
    nothing = torch.empty(0, len(Part), dtype=torch.int64)
    for kinds in (0, 2):
        tables = torch.empty(kinds, 0, len(Field), dtype=torch.int64)
        torch.ops.qsdp.encode_all(buffers, tables, nothing, HEADER, payloads)
        torch.ops.qsdp.decode_all(payloads, tables, nothing, buffers)
    assert (payloads == 1).all()
    parts = torch.tensor([[5, 1, 2, 1, 0]])
    torch.ops.qsdp.encode_all(buffers, tables, parts, HEADER, payloads)
    torch.ops.qsdp.decode_all(payloads, tables, parts, buffers)
    assert (payloads[0] == 1).all()
    assert payloads[1].view(torch.int64).tolist() == [*HEADER, 0]


@pytest.mark.parametrize("name", native.available())
def test_the_operators_pass_torchs_own_checks(name: str) -> None:
    segment = Segment(bits=5, dtype=DType.FP32, padded=20, parameter=0, rounding=2, levels=1)
    layout = Layout([segment], 0)
    tables = torch.tensor([layout.table([20]), layout.table([13])])
    parts = torch.tensor([[3, 0, 0, 1, 0], [4, 1, 0, 0, 0]])
    buffers = torch.randn(1, 20).view(torch.uint8)
    payloads = torch.zeros(2, layout.payload_bytes, dtype=torch.uint8)
    levels = torch.linspace(0, 1, 33)
    encoding = (buffers, tables, parts, HEADER, payloads, levels)
    adding = parts.clone()
    adding[1, Part.ADD] = 1
    with gpu_kernels.serving(name):
        torch.library.opcheck(torch.ops.qsdp.encode_all.default, encoding)
        decoding = (payloads, tables, adding, buffers, levels)
        torch.library.opcheck(torch.ops.qsdp.decode_all.default, decoding)
