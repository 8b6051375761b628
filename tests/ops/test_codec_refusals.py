"""What the codec's operators refuse, and that torch accepts the operators."""

from __future__ import annotations

import re

import pytest
import torch

from qsdp.codec.payload import Field, Layout, Part, Segment
from qsdp.common.dtypes import DType
from qsdp.common.rounding import Rounding
from qsdp.ops.reference import codec


def call(**changes: object) -> dict[str, object]:
    """Arguments of a good encode, with changes to table fields or to whole arguments."""
    segment = Segment(bits=4, dtype=DType.FP32, padded=40, parameter=0, bucket=16)
    layout = Layout([segment], 0)
    row = layout.table([40])[0]
    for name, value in changes.items():
        if name in Field.__members__:
            row[Field[name]] = value
    given = {
        "buffer": torch.ones(160, dtype=torch.uint8),
        "table": torch.tensor([row]),
        "key": 1,
        "header": layout.header(0, 0),
        "payload": torch.zeros(layout.payload_bytes, dtype=torch.uint8),
    }
    return given | {name: v for name, v in changes.items() if name not in Field.__members__}


BYTES = torch.uint8
LEVELS = torch.linspace(0, 1, 16)


def learned(**changes: object) -> dict[str, object]:
    """As ``call``, of a segment of learned levels."""
    return call(**{"LEVELS": 0, "ROUNDING": 2, "levels": LEVELS} | changes)


def many(of: dict[str, object], part: int = 0, **changes: object) -> dict[str, object]:
    """Arguments of an encode_all of two payloads, with changes to one part or to whole arguments.

    Buffer, table and payload are those of ``of``; where tables can be stacked, the first is good.
    """
    good, table = call()["table"], of["table"]
    fits = table.shape == good.shape and table.dtype == good.dtype
    parts = torch.tensor([[1, 0, 0, 0, 0], [2, int(fits), 0, 1, 0]])
    for name, value in changes.items():
        if name in Part.__members__:
            parts[part, Part[name]] = value
    given = {
        "buffers": of["buffer"].unsqueeze(0),
        "tables": torch.stack([good, table]) if fits else table.unsqueeze(0),
        "parts": parts,
        "header": of["header"],
        "payloads": as_rows(of["payload"]),
        "levels": of.get("levels"),
    }
    return given | {name: v for name, v in changes.items() if name not in Part.__members__}


def as_rows(payload: torch.Tensor) -> torch.Tensor:
    """Two of it, strided if it is."""
    rows = payload.new_zeros(2, *payload.shape, 1 if payload.is_contiguous() else 2)[..., 0]
    return rows.copy_(payload)


# The specification, and whatever kernels serve the CPU.
KERNELS = {"specification": codec, "in use": torch.ops.qsdp}
BAD_CALLS = {
    "1 bit": call(BITS=1),
    "9 bits": call(BITS=9),
    "minus bits": call(BITS=-4),
    "16 bits": call(BITS=16),
    "too many values": call(NUMEL=41),
    "fewer than no values": call(NUMEL=-1),
    "no bucket": call(BUCKET=0),
    "bucket of 12": call(BUCKET=12),
    "bucket of -8": call(BUCKET=-8),
    "unknown rounding": call(ROUNDING=len(Rounding)),
    "unknown dtype": call(DTYPE=7),
    "unknown wire dtype": call(BITS=0, WIRE=-1),
    "coded opaque": call(DTYPE=DType.OPAQUE),
    "raw opaque on one side": call(BITS=0, WIRE=DType.OPAQUE),
    "start before the buffer": call(BUFFER_BYTE=-4),
    "end after the buffer": call(BUFFER_BYTE=4),
    "metadata in the header": call(META_BYTE=24),
    "metadata after the end": call(META_BYTE=1 << 40),
    "codes in the header": call(DATA_BYTE=16),
    "codes after the end": call(DATA_BYTE=80),
    "float buffer": call(buffer=torch.ones(40)),
    "matrix buffer": call(buffer=torch.ones(4, 40, dtype=BYTES)),
    "strided buffer": call(buffer=torch.ones(320, dtype=BYTES)[::2]),
    "short buffer": call(buffer=torch.ones(159, dtype=BYTES)),
    "float payload": call(payload=torch.ones(80)),
    "strided payload": call(payload=torch.ones(320, dtype=BYTES)[::2]),
    "short payload": call(payload=torch.ones(64, dtype=BYTES)),
    "payload without room for a header": call(payload=torch.ones(31, dtype=BYTES)),
    "int32 table": call(table=torch.zeros(1, len(Field), dtype=torch.int32)),
    "flat table": call(table=torch.zeros(len(Field), dtype=torch.int64)),
    "narrow table": call(table=torch.zeros(1, 4, dtype=torch.int64)),
    "long header": call(header=[0] * 5),
    "short header": call(header=[0] * 3),
    "one-word header": call(header=[0]),
    "levels that are missing": learned(levels=None),
    "too few levels": learned(levels=LEVELS[:-1]),
    "levels that start too late": learned(LEVELS=1),
    "levels that start before the first": learned(LEVELS=-2),
    "levels that start beyond all": learned(LEVELS=2**63 - 1),
    "levels of 7 bits": learned(BITS=7, levels=torch.zeros(128)),
    "levels of a raw segment": learned(BITS=0),
    "shifted levels": learned(ROUNDING=0),
    "dithered levels": learned(ROUNDING=1),
    "fp64 levels": learned(levels=LEVELS.double()),
    "a matrix of levels": learned(levels=LEVELS.view(4, 4)),
    "strided levels": learned(levels=torch.zeros(32)[::2]),
    "fp16 levels that nothing points to": call(levels=LEVELS.half()),
}


# What only calls of many payloads can be given; those of one that are bad are bad in them too.
BAD_PARTS = {
    "a table that is not there": many(call(), 1, TABLE=2),
    "a table before the first": many(call(), 1, TABLE=-1),
    "no table": many(call(), tables=torch.zeros(0, 1, len(Field), dtype=torch.int64)),
    "a buffer that is not there": many(call(), 1, BUFFER=1),
    "a buffer before the first": many(call(), 1, BUFFER=-1),
    "no buffer": many(call(), buffers=torch.zeros(0, 160, dtype=BYTES)),
    "a payload that is not there": many(call(), 1, PAYLOAD=2**62),
    "a payload before the first": many(call(), 1, PAYLOAD=-(2**63)),
    "no payload": many(call(), payloads=torch.zeros(0, 80, dtype=BYTES)),
    "neither added nor not": many(call(), 1, ADD=2),
    "added backwards": many(call(), 1, ADD=-1),
    "int32 parts": many(call(), parts=torch.zeros(2, len(Part), dtype=torch.int32)),
    "flat parts": many(call(), parts=torch.zeros(len(Part), dtype=torch.int64)),
    "narrow parts": many(call(), parts=torch.zeros(2, 4, dtype=torch.int64)),
    "no part, of no column": many(call(), parts=torch.zeros(0, 0, dtype=torch.int64)),
    "no part, and a bad table": many(call(BITS=1), parts=torch.zeros(0, 5, dtype=torch.int64)),
    "buffers whose rows have gaps": many(call(), buffers=torch.zeros(2, 161, dtype=BYTES)[:, 1:]),
    "payloads whose rows have gaps": many(call(), payloads=torch.zeros(2, 97, dtype=BYTES)[:, 1:]),
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_argument_is_refused_in_one_sentence_before_anything_is_written(name, kernels):
    ops, given = KERNELS[kernels], BAD_CALLS[name]
    rest = {"levels": given["levels"]} if "levels" in given else {}
    assert_refused(ops.encode, given, writes="payload")
    if "header" not in name:
        arguments = {field: given[field] for field in ("payload", "table", "key", "buffer")}
        assert_refused(ops.decode, arguments | rest, writes="buffer")
    assert_all_refused(ops, many(given), is_of_encode="header" in name)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", BAD_PARTS)
def test_a_bad_part_is_refused_in_one_sentence_before_anything_is_written(name, kernels):
    assert_all_refused(KERNELS[kernels], BAD_PARTS[name])


@pytest.mark.parametrize("kernels", KERNELS)
def test_only_decoding_adds(kernels):
    given = many(call(), 1, ADD=1)
    assert_refused(KERNELS[kernels].encode_all, given, writes="payloads")
    KERNELS[kernels].decode_all(*(given[name] for name in DECODE_ALL))


DECODE_ALL = ("payloads", "tables", "parts", "buffers", "levels")


def assert_all_refused(ops, given, is_of_encode=False):
    assert_refused(ops.encode_all, given, writes="payloads")
    if not is_of_encode:
        assert_refused(ops.decode_all, {name: given[name] for name in DECODE_ALL}, writes="buffers")


def assert_refused(operator, given, writes):
    before = given[writes].clone()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        operator(**given)
    assert_one_sentence(str(caught.value))
    assert torch.equal(given[writes], before)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16, DType.OPAQUE])
def test_adding_into_anything_but_fp32_is_refused_before_anything_is_written(dtype, kernels):
    good = Segment(bits=4, dtype=DType.FP32, padded=8, parameter=0, bucket=16)
    bits = 0 if dtype == DType.OPAQUE else 4
    bad = Segment(bits=bits, dtype=dtype, wire=dtype, padded=8, parameter=1, bucket=16)
    layout = Layout([good, bad], 0)
    buffer = torch.ones(layout.buffer_bytes, dtype=torch.uint8)
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    payload[32:36] = torch.tensor([1.5]).view(torch.uint8)
    table = torch.tensor(layout.table([8, 8]))
    ops, given = KERNELS[kernels], {"payload": payload, "table": table, "key": 1, "buffer": buffer}
    assert_refused(ops.decode, given | {"add": True}, writes="buffer")
    rows = (payload.unsqueeze(0), table.unsqueeze(0))
    parts = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 1]])
    given = dict(zip(DECODE_ALL, (*rows, parts, buffer.unsqueeze(0), None), strict=True))
    assert_refused(ops.decode_all, given, writes="buffers")
    assert bool((buffer == 1).all())
    ops.decode_all(*rows, parts[:1], buffer.unsqueeze(0))
    assert not bool((buffer == 1).all())


def assert_one_sentence(message: str) -> None:
    assert re.fullmatch(r".*[^.]\.", message), f"not one line with a full stop: {message}"
    assert ". " not in message, f"more than one sentence: {message}"
    assert re.search(r": (give|make|code) [^:;]*$", message), f"no advice at the end: {message}"


@pytest.mark.parametrize("given", [call(), learned()], ids=["uniform", "learned"])
@pytest.mark.parametrize("name", ["encode", "decode"])
def test_the_operators_pass_torchs_own_checks(name, given):
    ordered = ["buffer", "table", "key", "header", "payload"]
    if name == "decode":
        ordered = ["payload", "table", "key", "buffer"]
    rest = {"levels": given["levels"]} if "levels" in given else {}
    torch.library.opcheck(getattr(torch.ops.qsdp, name), tuple(given[key] for key in ordered), rest)
