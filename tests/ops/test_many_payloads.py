"""One call for the payloads of many ranks equals a call for each, and refuses what these refuse."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qsdp.codec.payload import Field, Layout, Part, Segment
from qsdp.common.dtypes import DType
from qsdp.common.rounding import Rounding
from qsdp.ops import native
from qsdp.ops.reference import codec
from tests.ops.test_codec_refusals import BAD_CALLS, assert_one_sentence
from tests.support import gpu_kernels

LEVELS = torch.linspace(0, 1, 16).square()
HEADER = [5, 6, 7, 8]
SIZES = [[333, 70, 41, 5], [200, 0, 9, 5], [0, 0, 0, 0]]
"""Valid values of each segment, by table."""
ROWS = 6
FLOATS = {DType.FP32: torch.float32, DType.BF16: torch.bfloat16}


@pytest.fixture(params=[*native.available(), gpu_kernels.PARAMS[0]])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with gpu_kernels.serving(request.param):
        yield request.param


@pytest.fixture
def generator() -> torch.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def layout_of(dtype: DType) -> Layout:
    """Coded segments of several roundings, one of learned levels, and a raw one."""
    own: list[dict[str, Any]] = [
        {"bits": 8, "rounding": Rounding.of("shift")},
        {"bits": 3, "rounding": Rounding.of("stochastic"), "bucket": 16},
        {"bits": 4, "rounding": Rounding.of("nearest"), "levels": 0},
        {"bits": 0, "wire": DType.BF16},
    ]
    return Layout(
        [
            Segment(dtype=dtype, parameter=i, padded=SIZES[0][i], **each)
            for i, each in enumerate(own)
        ],
        group=3,
    )


def tables_of(layout: Layout, dtype: DType | None = None) -> Tensor:
    return torch.tensor([layout.table(numels, dtype) for numels in SIZES])


def parts_of(generator: torch.Generator, rows: list[int], *, adds: bool = False) -> Tensor:
    """A part for each payload, in any order, with the buffers at ``rows``."""
    order = torch.randperm(len(rows), generator=generator)
    parts = torch.zeros(len(rows), len(Part), dtype=torch.int64)
    parts[:, Part.KEY] = torch.randint(-(2**63), 2**63 - 1, (len(rows),), generator=generator)
    parts[:, Part.TABLE] = torch.randint(0, len(SIZES), (len(rows),), generator=generator)
    parts[:, Part.BUFFER] = torch.tensor(rows)[order]
    parts[:, Part.PAYLOAD] = order
    if adds:
        parts[:, Part.ADD] = torch.randint(0, 2, (len(rows),), generator=generator)
    return parts


def some_buffers(layout: Layout, dtype: DType, generator: torch.Generator) -> Tensor:
    values = torch.randn(ROWS, layout.num_values, generator=generator)
    values[1, 10:60] = 0.0
    return values.to(FLOATS[dtype]).view(torch.uint8)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name.lower())
def test_one_call_equals_a_call_for_each(
    kernels: str, dtype: DType, num_threads: int, generator: torch.Generator
) -> None:
    layout = layout_of(dtype)
    tables = tables_of(layout)
    buffers = some_buffers(layout, dtype, generator)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        parts = parts_of(generator, [*range(ROWS - 1), 0])
        got, want = torch.full((2, ROWS + 1, layout.payload_bytes), 0xC5, dtype=torch.uint8)
        torch.ops.qsdp.encode_all(buffers, tables, parts, HEADER, got, LEVELS)
        for key, table, buffer, payload, _ in parts.tolist():
            codec.encode(buffers[buffer], tables[table], key, HEADER, want[payload], LEVELS)
        assert torch.equal(got, want)  # the last row, which no part names, too

        whole = torch.zeros(len(parts), len(Part), dtype=torch.int64)
        whole[:, Part.BUFFER] = whole[:, Part.PAYLOAD] = torch.arange(len(parts))
        payloads = want[:ROWS].clone()  # whole ones, so that any table may take them
        codec.encode_all(buffers, tables, whole, HEADER, payloads, LEVELS)
        sums = torch.randn(ROWS, layout.num_values, generator=generator).view(torch.uint8)
        for rows, into, given, adds in (
            ([*range(ROWS - 1), 0], tables, buffers, False),
            ([4, 0, 0, 2, 2, 2], tables_of(layout, DType.FP32), sums, True),
        ):
            parts = parts_of(generator, rows, adds=adds)
            got, want = given.clone(), given.clone()
            torch.ops.qsdp.decode_all(payloads, into, parts, got, LEVELS)
            for key, table, buffer, payload, add in parts.tolist():
                row = want[buffer]
                codec.decode(payloads[payload], into[table], key, row, bool(add), LEVELS)
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


def test_threads_share_slices_and_keep_the_order_of_sums(generator: torch.Generator) -> None:
    """Many small slices, enough of them for several threads: ranges end inside any of them."""
    layout = layout_of(DType.FP32)
    tables = tables_of(layout)
    buffers = some_buffers(layout, DType.FP32, generator).repeat(60, 1)
    parts = parts_of(generator, [0] * len(buffers))
    parts[:, Part.BUFFER] = parts[:, Part.PAYLOAD] = torch.arange(len(buffers))
    outputs = []
    before = torch.get_num_threads()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        payloads = torch.full((len(buffers), layout.payload_bytes), 0xC5, dtype=torch.uint8)
        torch.ops.qsdp.encode_all(buffers, tables, parts, HEADER, payloads, LEVELS)
        decoded = torch.full_like(buffers, 0xC5)
        torch.ops.qsdp.decode_all(payloads, tables, parts, decoded, LEVELS)
        into_one = parts.clone()
        into_one[:, Part.BUFFER], into_one[:, Part.ADD] = 0, 1
        sums = torch.zeros_like(buffers[:1])
        torch.ops.qsdp.decode_all(payloads, tables, into_one, sums, LEVELS)
        outputs.append((payloads, decoded, sums))
    torch.set_num_threads(before)
    for others in outputs[1:]:
        assert all(map(torch.equal, others, outputs[0]))
    for place in (0, 7, len(buffers) - 1):
        key, table, *_ = parts[place].tolist()
        want = torch.zeros_like(payloads[place])
        torch.ops.qsdp.encode(buffers[place], tables[table], key, HEADER, want, LEVELS)
        assert torch.equal(payloads[place], want)


@pytest.mark.parametrize("payload_bytes", [32, 48])
def test_nothing_to_do_is_done(kernels: str, payload_bytes: int) -> None:
    empty = torch.zeros(0, 0, len(Field), dtype=torch.int64)
    nobody = torch.zeros(0, len(Part), dtype=torch.int64)
    payloads = torch.full((2, payload_bytes), 7, dtype=torch.uint8)
    buffers = torch.zeros(3, 0, dtype=torch.uint8)
    torch.ops.qsdp.encode_all(buffers, empty, nobody, HEADER, payloads)
    torch.ops.qsdp.decode_all(payloads, empty, nobody, buffers)
    assert bool((payloads == 7).all())
    # A table without segments: a header alone, and zeros behind it.
    part = torch.tensor([[1, 0, 2, 1, 0]])
    torch.ops.qsdp.encode_all(buffers, empty.new_zeros(1, 0, len(Field)), part, HEADER, payloads)
    assert payloads[1, :32].view(torch.int64).tolist() == HEADER
    assert not payloads[1, 32:].any()
    assert bool((payloads[0] == 7).all())


# --- what is refused ------------------------------------------------------------------------------

KERNELS = {
    "specification": (codec.encode_all, codec.decode_all),
    "in use": (torch.ops.qsdp.encode_all, torch.ops.qsdp.decode_all),
}
GOOD_PART = [1, 0, 0, 0, 0]
BAD_PARTS: dict[str, Any] = {
    "a table before the first": {Part.TABLE: -1},
    "a table beyond the last": {Part.TABLE: 1},
    "a buffer before the first": {Part.BUFFER: -1},
    "a buffer beyond the last": {Part.BUFFER: 2},
    "a payload before the first": {Part.PAYLOAD: -(2**63)},
    "a payload beyond the last": {Part.PAYLOAD: 2},
    "twice added": {Part.ADD: 2},
    "subtracted": {Part.ADD: -1},
    "int32": torch.zeros(1, len(Part), dtype=torch.int32),
    "flat": torch.zeros(len(Part), dtype=torch.int64),
    "narrow": torch.zeros(1, len(Part) - 1, dtype=torch.int64),
}


def refused(work: Any, written: Tensor, *given: Any) -> None:
    before = written.clone()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        work(*given)
    assert_one_sentence(str(caught.value))
    assert torch.equal(written, before)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", BAD_PARTS)
def test_a_bad_part_is_refused_before_anything_is_written(name: str, kernels: str) -> None:
    encode_all, decode_all = KERNELS[kernels]
    layout = layout_of(DType.FP32)
    tables = tables_of(layout)[:1]
    change = BAD_PARTS[name]
    parts = change
    if isinstance(change, dict):
        parts = torch.tensor([GOOD_PART, GOOD_PART])
        for column, value in change.items():
            parts[1, column] = value
    buffers = torch.ones(2, layout.buffer_bytes, dtype=torch.uint8)
    payloads = torch.ones(2, layout.payload_bytes, dtype=torch.uint8)
    refused(encode_all, payloads, buffers, tables, parts, HEADER, payloads, LEVELS)
    refused(decode_all, buffers, payloads, tables, parts, buffers, LEVELS)


@pytest.mark.parametrize("kernels", KERNELS)
def test_only_decode_adds_and_only_into_fp32(kernels: str) -> None:
    encode_all, decode_all = KERNELS[kernels]
    layout = layout_of(DType.BF16)
    tables = torch.cat([tables_of(layout, DType.FP32)[:1], tables_of(layout)[:1]])
    buffers = torch.ones(2, 4 * layout.num_values, dtype=torch.uint8)
    payloads = torch.ones(2, layout.payload_bytes, dtype=torch.uint8)
    adding = torch.tensor([GOOD_PART, [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    refused(encode_all, payloads, buffers, tables, adding, HEADER, payloads, LEVELS)
    refused(decode_all, buffers, payloads, tables, adding, buffers, LEVELS)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", BAD_CALLS)
def test_what_a_call_for_one_refuses_is_refused(name: str, kernels: str) -> None:
    encode_all, decode_all = KERNELS[kernels]
    given = BAD_CALLS[name]
    buffers, payloads = (
        given[key][None] if given[key].dim() == 1 else given[key][:, None].expand(4, 2, 40)
        for key in ("buffer", "payload")
    )
    tables, parts = given["table"][None], torch.tensor([GOOD_PART])
    levels = given.get("levels")
    refused(encode_all, payloads, buffers, tables, parts, given["header"], payloads, levels)
    if "header" not in name:
        refused(decode_all, buffers, payloads, tables, parts, buffers, levels)


@pytest.mark.parametrize("name", ["encode_all", "decode_all"])
def test_the_operators_pass_torchs_own_checks(name: str) -> None:
    layout = layout_of(DType.FP32)
    buffers = torch.ones(2, layout.buffer_bytes, dtype=torch.uint8)
    payloads = torch.zeros(2, layout.payload_bytes, dtype=torch.uint8)
    parts = torch.tensor([GOOD_PART])
    ordered: tuple[Any, ...] = (buffers, tables_of(layout), parts, HEADER, payloads)
    if name == "decode_all":
        ordered = (payloads, tables_of(layout), parts, buffers)
    torch.library.opcheck(getattr(torch.ops.qsdp, name), ordered, {"levels": LEVELS})
