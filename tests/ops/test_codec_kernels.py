"""Compiled kernels against the specification: the same bytes, and nothing else touched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsdp.codec.payload import Layout, Segment
from qsdp.codec.segment_table import Field, Part
from qsdp.common.dtypes import DType
from qsdp.common.rounding import Rounding
from qsdp.ops import native
from qsdp.ops.reference import codec
from tests.support import gpu_kernels, patience
from tests.support.codec_wire import segments_of_sizes
from tests.support.command_line import assert_is_one_sentence
from tests.support.kernel_inputs import (
    CANARY,
    assert_canaries,
    assert_same_values,
    hard_values,
    off_by,
)

COMPILED = [name for name in native.available() if name != native.PYTHON]
ABSENT = "the native library is not installed: there are only Python kernels to run"
LENGTHS = (0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 129, 1023, 1024, 1025, 2055)
FLOATS = {DType.FP32: torch.float32, DType.BF16: torch.bfloat16, DType.FP16: torch.float16}
LEVEL_STARTS = {bits: (1 << bits) + 3 * bits for bits in range(2, 7)}


@pytest.fixture(
    params=[
        *(COMPILED or [pytest.param("none", marks=pytest.mark.skip(reason=ABSENT))]),
        *gpu_kernels.PARAMS,
    ]
)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with gpu_kernels.serving(request.param):
        yield request.param


def some_levels(generator: torch.Generator) -> Tensor:
    """fp32: for each of 2 to 6 bits 2**bits levels from ``LEVEL_STARTS`` on, some of them equal."""
    levels = torch.full((LEVEL_STARTS[6] + 64,), torch.nan)
    for bits, start in LEVEL_STARTS.items():
        own = torch.rand(1 << bits, generator=generator).mul(20).round().div(20)
        own[0], own[-1] = 0.0, 1.0
        levels[start : start + own.numel()] = own.sort().values
    return levels


def layout_of(
    dtype: DType, rounding: int, generator: torch.Generator, learned: bool = False
) -> Layout:
    buckets = (8, 40, 64, 1000, 1024, 4096)
    segments = []
    for bits, padded in product(range(2, 9), LENGTHS):
        bucket = buckets[int(torch.randint(0, len(buckets), (), generator=generator))]
        segments.append(
            Segment(
                bits=bits,
                dtype=dtype,
                padded=padded,
                parameter=len(segments),
                bucket=bucket,
                rounding=rounding,
                levels=LEVEL_STARTS.get(bits, -1) if learned else -1,
            )
        )
        if len(segments) % 10 == 0:
            wire = (DType.FP32, DType.BF16, DType.FP16)[len(segments) // 10 % 3]
            raw = Segment(bits=0, dtype=dtype, padded=padded, parameter=0, wire=wire)
            segments.append(raw)
    return Layout(segments, group=77)


def some_valid(layout: Layout, generator: torch.Generator) -> list[int]:
    """All values of most segments, fewer (padding) or none of others."""
    return [
        padded if torch.rand((), generator=generator) < 0.7 else padded * 2 // 3
        for padded in (segment.padded for segment in layout.segments)
    ]


WITH_LEVELS = [rounding for rounding in Rounding if rounding.properties.has_levels]
every_rounding = pytest.mark.parametrize(
    ("rounding", "learned"),
    [
        *((rounding, False) for rounding in Rounding),
        *((rounding, True) for rounding in WITH_LEVELS),
    ],
    ids=[
        *(rounding.label for rounding in Rounding),
        *(f"learned {rounding.label}" for rounding in WITH_LEVELS),
    ],
)


@every_rounding
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name.lower())
def test_bytes_and_values_equal_the_specification(
    kernels: str, dtype: DType, rounding: int, learned: bool, generator: torch.Generator
) -> None:
    layout = layout_of(dtype, rounding, generator, learned)
    levels = some_levels(generator) if learned else None
    table = torch.tensor(layout.table(some_valid(layout, generator)))
    buffer, whole_buffer = off_by(layout.buffer_bytes, 3)
    values = hard_values(layout.num_values, generator).to(FLOATS[dtype])
    buffer.copy_(values.view(torch.uint8))
    key = int(torch.randint(-(2**63), 2**63 - 1, (), generator=generator))
    header = layout.header(sender=3, step=2**40)

    want = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    codec.encode(buffer, table, key, header, want, levels)
    got, whole = off_by(layout.payload_bytes, 1)
    torch.ops.qsdp.encode(buffer, table, key, header, got, levels)
    assert torch.equal(got, want)
    assert_canaries(whole, got)
    assert_canaries(whole_buffer, buffer)

    want_values = torch.full_like(buffer, 9)
    codec.decode(want, table, key, want_values, levels=levels)
    got_values, whole = off_by(layout.buffer_bytes, 5)
    torch.ops.qsdp.decode(got, table, key, got_values, levels=levels)
    assert_same_values(got_values, want_values, FLOATS[dtype])
    assert_canaries(whole, got_values)

    wide = torch.tensor(layout.table(table[:, Field.NUMEL].tolist(), DType.FP32))
    sums = torch.randn(layout.num_values, generator=generator).view(torch.uint8)
    got_sums, whole = off_by(sums.numel(), 7)
    got_sums.copy_(sums)
    codec.decode(want, wide, key, sums, add=True, levels=levels)
    torch.ops.qsdp.decode(got, wide, key, got_sums, add=True, levels=levels)
    assert_same_values(got_sums, sums, torch.float32)
    assert_canaries(whole, got_sums)


@every_rounding
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name.lower())
def test_whole_buckets_at_even_addresses(
    kernels: str, dtype: DType, rounding: int, learned: bool, generator: torch.Generator
) -> None:
    """What kernels are made for: few large segments, whose buckets start at multiples of 64."""
    levels = some_levels(generator) if learned else None
    buckets = (64, 128, 256, 384, 512, 1024, 2048)
    for bits in range(2, 9):
        own = {"bits": bits, "dtype": dtype, "rounding": rounding}
        own |= {"levels": LEVEL_STARTS.get(bits, -1)} if learned else {}
        segments = [
            Segment(padded=2048 + 8 * (i % 3), parameter=i, bucket=bucket, **own)
            for i, bucket in enumerate(buckets)
        ]
        layout = Layout(segments, group=1)
        table = torch.tensor(layout.table([segment.padded for segment in segments]))
        values = hard_values(layout.num_values, generator).to(FLOATS[dtype])
        buffer, key = values.view(torch.uint8), int(torch.randint(2**62, (), generator=generator))
        got, want = torch.full((2, layout.payload_bytes), CANARY, dtype=torch.uint8)
        torch.ops.qsdp.encode(buffer, table, key, [1, 2, 3, 4], got, levels)
        codec.encode(buffer, table, key, [1, 2, 3, 4], want, levels)
        assert torch.equal(got, want), bits
        got_values, want_values = torch.full((2, buffer.numel()), CANARY, dtype=torch.uint8)
        torch.ops.qsdp.decode(got, table, key, got_values, levels=levels)
        codec.decode(want, table, key, want_values, levels=levels)
        assert_same_values(got_values, want_values, FLOATS[dtype])
        wide = torch.tensor(layout.table(table[:, Field.NUMEL].tolist(), DType.FP32))
        got_sums, want_sums = torch.randn(layout.num_values, generator=generator).expand(2, -1)
        got_sums, want_sums = got_sums.clone(), want_sums.clone()
        torch.ops.qsdp.decode(got, wide, key, got_sums.view(torch.uint8), add=True, levels=levels)
        codec.decode(want, wide, key, want_sums.view(torch.uint8), add=True, levels=levels)
        assert_same_values(got_sums.view(torch.uint8), want_sums.view(torch.uint8), torch.float32)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name.lower())
def test_any_metadata_decodes_as_in_the_specification(
    kernels: str, dtype: DType, generator: torch.Generator
) -> None:
    for rounding in Rounding:
        segments = [
            Segment(bits=b, dtype=dtype, padded=500, parameter=1, bucket=16, rounding=rounding)
            for b in range(2, 9)
        ]
        layout = Layout(segments, group=0)
        table = torch.tensor(layout.table([500] * 7))
        payload = torch.randint(0, 256, (layout.payload_bytes,), generator=generator)
        payload = payload.to(torch.uint8)
        got, want = torch.zeros(2, layout.buffer_bytes, dtype=torch.uint8)
        torch.ops.qsdp.decode(payload, table, 5, got)
        codec.decode(payload, table, 5, want)
        assert_same_values(got, want, FLOATS[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name.lower())
def test_any_levels_and_metadata_give_what_the_specification_gives(
    kernels: str, dtype: DType, generator: torch.Generator
) -> None:
    """Levels that do not rise, that are huge, NaN or Inf: the same bytes, and nothing outside."""
    segments = [
        Segment(
            bits=bits,
            dtype=dtype,
            padded=500,
            parameter=1,
            bucket=(16, 128)[rounding % 2],
            rounding=rounding,
            levels=LEVEL_STARTS[bits],
        )
        for bits, rounding in product(LEVEL_STARTS, WITH_LEVELS)
    ]
    layout = Layout(segments, group=0)
    table = torch.tensor(layout.table([500] * len(segments)))
    for rubbish in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45):
        levels = torch.randn(LEVEL_STARTS[6] + 64, generator=generator)
        levels[torch.rand(levels.shape, generator=generator) < 0.3] = rubbish
        values = hard_values(layout.num_values, generator).to(FLOATS[dtype])
        payload, want = torch.zeros(2, layout.payload_bytes, dtype=torch.uint8)
        arguments = (values.view(torch.uint8), table, 5, [1, 2, 3, 4])
        torch.ops.qsdp.encode(*arguments, payload, levels)
        codec.encode(*arguments, want, levels)
        assert torch.equal(payload, want)
        payload = torch.randint(0, 256, payload.shape, generator=generator).to(torch.uint8)
        got, want = torch.zeros(2, layout.buffer_bytes, dtype=torch.uint8)
        torch.ops.qsdp.decode(payload, table, 5, got, levels=levels)
        codec.decode(payload, table, 5, want, levels=levels)
        assert_same_values(got, want, FLOATS[dtype])


def test_raw_segments_travel_as_asked(kernels: str, generator: torch.Generator) -> None:
    for dtype, wire in product(FLOATS, FLOATS):
        layout = Layout([Segment(bits=0, dtype=dtype, padded=101, parameter=0, wire=wire)], 0)
        table = torch.tensor(layout.table([99]))
        values = hard_values(101, generator).mul(1e3).to(FLOATS[dtype])
        values[::9], values[5], values[6], values[7] = torch.nan, torch.inf, 65519.9, 2.0**-25
        payload, want = torch.full((2, layout.payload_bytes), 3, dtype=torch.uint8)
        arguments = (values.view(torch.uint8), table, 0, [1, 2, 3, 4])
        torch.ops.qsdp.encode(*arguments, payload)
        codec.encode(*arguments, want)
        data = table[0, Field.DATA_BYTE]
        end = data + 99 * FLOATS[wire].itemsize
        assert_same_values(payload[data:end], want[data:end], FLOATS[wire])
        assert torch.equal(payload[:data], want[:data])
        assert not payload[end:].any()
        got = torch.full((layout.buffer_bytes,), 7, dtype=torch.uint8)
        codec.decode(payload, table, 0, want := torch.zeros_like(got))
        torch.ops.qsdp.decode(payload, table, 0, got)
        assert_same_values(got, want, FLOATS[dtype])


@pytest.mark.parametrize("length", [4, 99])
@pytest.mark.parametrize("add", [False, True])
def test_any_fp16_nan_becomes_the_canonical_one_in_fp32(
    kernels: str, generator: torch.Generator, length: int, add: bool
) -> None:
    segment = Segment(bits=0, dtype=DType.FP16, wire=DType.FP16, padded=length, parameter=0)
    layout = Layout([segment], 0)
    bits = torch.randint(0x7C01, 0x8000, (length,), generator=generator).short()
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    sent = torch.where(torch.arange(length) % 2 == 0, bits, bits | -0x8000).view(torch.uint8)
    torch.ops.qsdp.encode(sent, torch.tensor(layout.table([length])), 0, [1, 2, 3, 4], payload)
    got = torch.ones(length)
    table = torch.tensor(layout.table([length], DType.FP32))
    torch.ops.qsdp.decode(payload, table, 0, got.view(torch.uint8), add)
    assert (got.view(torch.int32) == 0x7FC00000).all()


def test_opaque_bytes_travel_untouched(kernels: str, generator: torch.Generator) -> None:
    segment = Segment(bits=0, dtype=DType.OPAQUE, padded=77, parameter=0, wire=DType.OPAQUE)
    layout = Layout([segment], 0)
    table = torch.tensor(layout.table([70]))
    buffer = torch.randint(0, 256, (77,), generator=generator).to(torch.uint8)
    payload = torch.full((layout.payload_bytes,), 3, dtype=torch.uint8)
    torch.ops.qsdp.encode(buffer, table, 0, [1, 2, 3, 4], payload)
    got = torch.full_like(buffer, 9)
    torch.ops.qsdp.decode(payload, table, 0, got)
    assert torch.equal(got[:70], buffer[:70])
    assert not got[70:].any()


def test_threads_do_not_change_bytes(kernels: str, generator: torch.Generator) -> None:
    segments = segments_of_sizes({8: 70_001, 5: 5, 3: 200_000, 4: 0, 6: 33_333})
    segments.append(Segment(bits=0, dtype=DType.FP32, padded=99_999, parameter=9, wire=DType.BF16))
    learned = {"bits": 4, "rounding": 2, "levels": LEVEL_STARTS[4]}
    segments.append(Segment(dtype=DType.FP32, padded=150_000, parameter=7, **learned))
    levels = some_levels(generator)
    layout = Layout(segments, group=1)
    table = torch.tensor(layout.table([s.padded - min(s.padded, 3) for s in segments]))
    buffer = torch.randn(layout.num_values, generator=generator).view(torch.uint8)
    threads, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            payload = torch.full((layout.payload_bytes,), 3, dtype=torch.uint8)
            torch.ops.qsdp.encode(buffer, table, 8, [1, 2, 3, 4], payload, levels)
            values = torch.full_like(buffer, 3)
            torch.ops.qsdp.decode(payload, table, 8, values, levels=levels)
            results.append((payload, values))
    finally:
        torch.set_num_threads(threads)
    for payload, values in results[1:]:
        assert torch.equal(payload, results[0][0])
        assert torch.equal(values, results[0][1])


@pytest.mark.parametrize("name", native.available())
def test_opcheck_passes(name: str) -> None:
    before = native.capability()
    uniform = {"bits": 5, "dtype": DType.FP32, "padded": 100, "bucket": 64}
    learned = {**uniform, "rounding": 2, "levels": 1}
    layout = Layout([Segment(parameter=0, **uniform), Segment(parameter=1, **learned)], 0)
    table = torch.tensor(layout.table([90, 100]))
    buffer = torch.randn(200).view(torch.uint8)
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    encoding = (buffer, table, 3, layout.header(0, 0), payload)
    levels = torch.linspace(0, 1, 33)
    try:
        native.use(name)
        for given in ({"levels": levels}, {"levels": None}, {}):
            table[1, Field.LEVELS] = 1 if given.get("levels") is not None else -1
            torch.library.opcheck(torch.ops.qsdp.encode.default, encoding, given)
            for add in ({}, {"add": True}):
                decoding = (payload, table, 3, buffer)
                torch.library.opcheck(torch.ops.qsdp.decode.default, decoding, {**add, **given})
    finally:
        native.use(before)


BAD_FIELDS = [
    (Field.BITS, 1),
    (Field.BITS, 9),
    (Field.BITS, -1),
    (Field.DTYPE, 4),
    (Field.DTYPE, DType.OPAQUE),
    (Field.WIRE, -1),
    (Field.BUFFER_BYTE, -4),
    (Field.BUFFER_BYTE, 2),
    (Field.BUFFER_BYTE, 2**62),
    (Field.NUMEL, -1),
    (Field.NUMEL, 101),
    (Field.PADDED, 101),
    (Field.PADDED, 2**62),
    (Field.BUCKET, 0),
    (Field.BUCKET, 12),
    (Field.BUCKET, -8),
    (Field.ROUNDING, len(Rounding)),
    (Field.ROUNDING, -1),
    (Field.META_BYTE, 0),
    (Field.META_BYTE, 34),
    (Field.META_BYTE, 2**63 - 1),
    (Field.DATA_BYTE, 31),
    (Field.DATA_BYTE, 2**62),
    (Field.LEVELS, 0),
    (Field.LEVELS, -2),
    (Field.LEVELS, 2**63 - 1),
]


@pytest.mark.parametrize("name", native.available())
@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_bad_tables_raise(name: str, field: Field, value: int) -> None:
    before = native.capability()
    layout = Layout([Segment(bits=4, dtype=DType.FP32, padded=100, parameter=0, bucket=64)], 0)
    table = torch.tensor(layout.table([100]))
    table[0, field] = value
    buffer = torch.zeros(layout.buffer_bytes, dtype=torch.uint8)
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    try:
        native.use(name)
        with pytest.raises(ValueError):
            torch.ops.qsdp.encode(buffer, table, 0, [0, 0, 0, 0], payload)
        with pytest.raises(ValueError):
            torch.ops.qsdp.decode(payload, table, 0, buffer)
    finally:
        native.use(before)


def test_bad_tensors_raise(kernels: str) -> None:
    layout = Layout([Segment(bits=4, dtype=DType.BF16, padded=100, parameter=0, bucket=64)], 0)
    table = torch.tensor(layout.table([100]))
    buffer = torch.zeros(layout.buffer_bytes, dtype=torch.uint8)
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    header = [0, 0, 0, 0]
    for bad in (buffer.view(torch.int8), buffer.view(2, -1), buffer[::2]):
        with pytest.raises(ValueError, match=r"the buffer is .* give a contiguous 1-D uint8"):
            torch.ops.qsdp.encode(bad, table, 0, header, payload)
    for bad in (table.int(), table[0], table[:, :-1]):
        with pytest.raises(ValueError, match="the table"):
            torch.ops.qsdp.decode(payload, bad, 0, buffer)
    with pytest.raises(ValueError, match="the payload has 31 bytes"):
        torch.ops.qsdp.decode(payload[:31], table, 0, buffer)
    with pytest.raises(ValueError, match="the header has 3 words"):
        torch.ops.qsdp.encode(buffer, table, 0, header[:3], payload)
    with pytest.raises(ValueError, match="give an fp32 buffer"):
        torch.ops.qsdp.decode(payload, table, 0, buffer, add=True)
    rows, parts = (payload[None], table[None]), torch.tensor([[0, 0, 0, 0, 0]])
    for place, value, told in (
        (Part.TABLE, 1, "a part names table 1 of 1: give one"),
        (Part.BUFFER, -1, "a part names buffer -1 of 1: give one"),
        (Part.PAYLOAD, 7, "a part names payload 7 of 1: give one"),
        (Part.ADD, 2, "a part has ADD 2: give 0 or 1"),
        (Part.ADD, 1, "give an fp32 buffer"),
    ):
        bad = parts.clone()
        bad[0, place] = value
        with pytest.raises(ValueError, match=told):
            torch.ops.qsdp.decode_all(*rows, bad, buffer[None])
    with pytest.raises(ValueError, match="the header has 5 words"):
        torch.ops.qsdp.encode_all(buffer[None], table[None], parts, [*header, 0], payload[None])
    with pytest.raises(ValueError, match=r"the payloads are .* give contiguous 2-D uint8 rows"):
        torch.ops.qsdp.encode_all(buffer[None], table[None], parts, header, payload)


def test_python_serves_where_it_is_asked_for() -> None:
    before = native.capability()
    try:
        native.use(native.PYTHON)
        assert native.capability() == native.PYTHON
    finally:
        native.use(before)
    assert native.capability() == before
    with pytest.raises(ValueError, match="no neon kernels can run here"):
        native.use("neon")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("QSDP_CPU_CAPABILITY", "sse2", "QSDP_CPU_CAPABILITY is sse2: give one of default"),
        ("QSDP_CPU_CAPABILITY", "avx512", "QSDP_CPU_CAPABILITY is avx512, which cannot run here"),
    ],
)
def test_the_environment_is_obeyed_or_refused(variable: str, value: str, sentence: str) -> None:
    if value == "avx512" and "avx512" in COMPILED:
        pytest.skip(f"{variable}={value} is fine on this machine")
    environment = {**os.environ, variable: value}
    command = [sys.executable, "-m", "qsdp", "selfcheck"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=patience.seconds()
    )
    assert done.returncode == 2
    assert_is_one_sentence(done.stderr)
    assert sentence in done.stderr


def test_a_missing_library_is_an_error_where_it_is_required(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_qsdp_native.so")
    monkeypatch.setenv("QSDP_REQUIRE_NATIVE", "1")
    with pytest.raises(native.UnusableKernels, match="QSDP_REQUIRE_NATIVE is 1, but"):
        native.load()
