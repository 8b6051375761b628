"""What the codec's operators refuse, and that torch accepts the operators."""

from __future__ import annotations

import re

import pytest
import torch

from qsdp.codec.payload import Field, Layout, Segment
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
    """As `call`, of a segment of learned levels."""
    return call(**{"LEVELS": 0, "ROUNDING": 2, "levels": LEVELS} | changes)


# The specification, and whatever kernels serve the CPU.
KERNELS = {
    "specification": (codec.encode, codec.decode),
    "in use": (torch.ops.qsdp.encode, torch.ops.qsdp.decode),
}
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


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_argument_is_refused_in_one_sentence_before_anything_is_written(name, kernels):
    encode, decode = KERNELS[kernels]
    given = BAD_CALLS[name]
    before = given["payload"].clone()
    rest = {"levels": given["levels"]} if "levels" in given else {}
    with pytest.raises((ValueError, RuntimeError)) as caught:
        encode(**given)
    assert_one_sentence(str(caught.value))
    assert torch.equal(given["payload"], before)
    if "header" not in name:
        before = given["buffer"].clone()
        with pytest.raises((ValueError, RuntimeError)) as caught:
            decode(given["payload"], given["table"], given["key"], given["buffer"], **rest)
        assert_one_sentence(str(caught.value))
        assert torch.equal(given["buffer"], before)


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
    with pytest.raises((ValueError, RuntimeError)) as caught:
        KERNELS[kernels][1](payload, table, 1, buffer, True)
    assert_one_sentence(str(caught.value))
    assert bool((buffer == 1).all())


def assert_one_sentence(message: str) -> None:
    assert message
    assert "\n" not in message
    assert not re.search(r"\. |\.$", message), f"more than one sentence: {message}"
    assert re.search(r"give|make|takes|code |choose", message), (
        f"does not say what is allowed: {message}"
    )


@pytest.mark.parametrize("given", [call(), learned()], ids=["uniform", "learned"])
@pytest.mark.parametrize("name", ["encode", "decode"])
def test_the_operators_pass_torchs_own_checks(name, given):
    ordered = ["buffer", "table", "key", "header", "payload"]
    if name == "decode":
        ordered = ["payload", "table", "key", "buffer"]
    rest = {"levels": given["levels"]} if "levels" in given else {}
    torch.library.opcheck(getattr(torch.ops.qsdp, name), tuple(given[key] for key in ordered), rest)
