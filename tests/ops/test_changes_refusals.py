"""What the operators of changes refuse: bytes that say nothing, and bad arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qsdp.codec.payload import Layout, Segment
from qsdp.codec.segment_table import Field
from qsdp.common.dtypes import DType
from qsdp.common.rounding import Rounding
from qsdp.ops import native
from qsdp.ops.reference import changes, codec
from qsdp.ops.reference.apply_changes import apply_changes
from qsdp.ops.reference.changes import encode_changes
from tests.support import gpu_kernels
from tests.support.frame_body import (
    BAD,
    BAD_LENGTH,
    NIBBLES,
    counts_of,
    data_bytes,
    nums_of,
)
from tests.support.kept_sender import ROOM, Sender, some
from tests.support.kernel_inputs import assert_canaries, off_by

KEEPS = [rounding for rounding in Rounding if rounding.properties.keeps_grids]


COMPILED = [name for name in native.available() if name != native.PYTHON]
ABSENT = "the native library is not installed: there are only Python kernels to run"


@pytest.fixture(
    params=[
        *(COMPILED or [pytest.param("none", marks=pytest.mark.skip(reason=ABSENT))]),
        *gpu_kernels.PARAMS,
    ]
)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with gpu_kernels.serving(request.param):
        yield request.param


def outcome(apply, body: Tensor, sender: Sender) -> Tensor | None:
    """The row with what ``body`` says, or None where it is refused, in one sentence."""
    kept, whole = off_by(sender.kept.numel(), 1)
    kept.copy_(sender.kept)
    said = ""
    try:
        apply(body, sender.table, sender.step, kept)
    except (ValueError, RuntimeError) as error:
        said = str(error)
    assert_canaries(whole, kept)
    assert re.fullmatch(r"(a frame [^:]*: give [^:.]*\.)?", said), said
    return None if said else kept


def damaged(body: Tensor, generator: torch.Generator) -> Tensor:
    """A body of which bytes are other ones, or which ends early or late."""
    body = body.clone()
    kind = some(8, generator)
    if kind == 0:
        return body[: some(len(body) + 1, generator)].clone()
    if kind == 1:
        return torch.cat((body, body[: 1 + some(4, generator)]))
    for _ in range(1 + some(2, generator)):
        at = some(len(body), generator)
        body[at] = int(body[at]) ^ 1 << some(8, generator) if kind < 6 else some(256, generator)
    return body


def made_up(sender: Sender, generator: torch.Generator) -> Tensor:
    """A body of the right length for its counts, which says anything."""
    counts, data = b"\xff", []
    for segment in changes.kept_rows(sender.table):
        heads = []
        for num in nums_of(segment):
            least = (0, 0, 0, 1, 1 + some(3, generator), 254, 255, 126 + some(128, generator))
            head = least[some(8, generator)]
            if segment.bits <= 5:
                head = next(each for each in NIBBLES if each >= head)
            heads.append(head)
            size = data_bytes(head, segment.bits, num)
            own = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
            if head <= changes.MOST_LISTED and some(4, generator):
                own = (own % num).sort().values
            data.append(own)
        counts += counts_of(segment, heads)
    return torch.cat((torch.tensor(list(counts), dtype=torch.uint8), *data))


def test_any_bytes_are_refused_or_applied_as_the_specification_does(kernels, generator):
    bits = (4, 8, 3, 2, 6, 5, 7, 4)
    coded = {"dtype": DType.FP32, "keeps_epochs": True, "rounding": KEEPS[0]}
    segments = [
        Segment(bits=b, padded=padded, parameter=i, bucket=bucket, **coded)
        for i, (b, padded, bucket) in enumerate(
            zip(bits, (40, 9, 17, 12, 8, 20, 3, 130), (16, 8, 8, 8, 8, 40, 8, 128), strict=True)
        )
    ]
    layout = Layout(segments, group=0)
    sender = Sender(layout, torch.randn(layout.num_values, generator=generator), generator)
    refused = 0
    for i in range(40):
        body = sender.send(redraw_every=5)
        others = [damaged(body, generator) for _ in range(4)]
        others += [made_up(sender, generator) for _ in range(4)]
        for other in others:
            want = outcome(apply_changes, other, sender)
            got = outcome(torch.ops.qsdp.apply_changes, other, sender)
            assert (want is None) == (got is None), (other, sender.table)
            assert want is None or torch.equal(want, got)
            refused += want is None
        sender.wander(0.01 if i % 3 else 0.3)
    assert 30 < refused < 290


@pytest.mark.parametrize(("bits", "body", "told"), BAD.values(), ids=BAD)
def test_frames_that_cannot_be_are_refused_in_one_sentence(kernels, bits, body, told):
    """By kernels in other words than the specification's, which name no values."""
    kept = {"padded": BAD_LENGTH, "parameter": 0, "bucket": 32, "keeps_epochs": True}
    layout = Layout([Segment(bits=bits, dtype=DType.FP32, rounding=KEEPS[0], **kept)], 0)
    row, whole = off_by(layout.payload_bytes, 3)
    row.fill_(0x77)
    frame = torch.frombuffer(bytearray(body + b"."), dtype=torch.uint8)[:-1]
    with pytest.raises(ValueError, match=f"^a frame .*{told}.*: give what encode_changes wrote"):
        torch.ops.qsdp.apply_changes(frame, torch.tensor(layout.table([BAD_LENGTH])), 3, row)
    assert_canaries(whole, row)
    assert (row == 0x77).all(), "a bucket that was wrongly said has changed"


def arguments(**changed: object) -> dict[str, object]:
    """Those of a good encode_changes, but for some; columns of the table by their names."""
    kept = {"padded": 40, "parameter": 0, "bucket": 16, "keeps_epochs": True}
    segments = [Segment(bits=4, dtype=DType.FP32, rounding=KEEPS[0], **kept)]
    segments.append(Segment(bits=0, dtype=DType.FP32, padded=3, parameter=1))
    layout = Layout(segments, 0)
    rows = layout.table([40, 3])
    for name, value in changed.items():
        if name in Field.__members__:
            rows[0][Field[name]] = value
        elif name == "raw_epochs":
            rows[1][Field.EPOCH_BYTE] = value
    given = {
        "buffer": torch.ones(172, dtype=torch.uint8),
        "table": torch.tensor(rows),
        "key": 1,
        "kept": torch.zeros(layout.payload_bytes, dtype=torch.uint8),
        "modes": torch.tensor([2, 2]),
        "step": 3,
        "redraw_every": 9,
        "room": ROOM,
        "frame": torch.zeros(1 + 3 * 9 + 20 + 12, dtype=torch.uint8),
        "counts": torch.zeros(3, dtype=torch.int64),
    }
    return given | {name: value for name, value in changed.items() if name in given}


OTHERS = [rounding for rounding in Rounding if rounding not in KEEPS]
OF_BOTH = {
    "no epochs": {"EPOCH_BYTE": -1},
    "epochs of a raw segment": {"raw_epochs": 32},
    "epochs at an odd byte": {"EPOCH_BYTE": 57},
    "epochs before the first byte": {"EPOCH_BYTE": -4},
    "epochs in the header": {"EPOCH_BYTE": 28},
    "epochs after the end": {"EPOCH_BYTE": 1 << 40},
    "buckets of 136": {"BUCKET": 136},
    **{f"a rounding by {each.label}": {"ROUNDING": each} for each in OTHERS},
    "9 bits": {"BITS": 9},
    "metadata after the end": {"META_BYTE": 1 << 40},
    "codes after the end": {"DATA_BYTE": 96},
    "too many values": {"NUMEL": 1 << 61, "PADDED": 1 << 61},
    "a step before 0": {"step": -1},
    "a step of 32 bits": {"step": 1 << 31},
    "a float row": {"kept": torch.zeros(40)},
    "a short row": {"kept": torch.zeros(64, dtype=torch.uint8)},
    "a matrix of bytes to say": {"frame": torch.zeros(9, 9, dtype=torch.uint8)},
    "an int32 table": {"table": torch.zeros(2, len(Field), dtype=torch.int32)},
    "a narrow table": {"table": torch.zeros(2, 4, dtype=torch.int64)},
}
OF_ENCODE = {
    "a start after the buffer": {"BUFFER_BYTE": 32},
    "a mode of 3": {"modes": torch.tensor([2, 3])},
    "a mode before 0": {"modes": torch.tensor([-1, 2])},
    "one mode of two": {"modes": torch.tensor([2])},
    "modes of 32 bits": {"modes": torch.tensor([2, 2], dtype=torch.int32)},
    "no step between two draws": {"redraw_every": 0},
    "no room": {"room": 0.0},
    "more room than range": {"room": 1.5},
    "room that is no number": {"room": float("nan")},
    "a short frame": {"frame": torch.zeros(59, dtype=torch.uint8)},
    "two counts": {"counts": torch.zeros(2, dtype=torch.int64)},
    "fp32 counts": {"counts": torch.zeros(3)},
}


@pytest.mark.parametrize("name", [*OF_BOTH, *OF_ENCODE])
def test_bad_arguments_are_refused_before_anything_is_written(name):
    given = arguments(**(OF_BOTH | OF_ENCODE)[name])
    of_apply = [given[each] for each in ("frame", "table", "step", "kept")]
    before = {each: given[each].clone() for each in ("kept", "frame", "counts")}
    calls = [
        (encode_changes, [*given.values()]),
        (torch.ops.qsdp.encode_changes, [*given.values()]),
    ]
    if name in OF_BOTH:
        calls += [(apply_changes, of_apply), (torch.ops.qsdp.apply_changes, of_apply)]
    for operator, all_given in calls:
        with pytest.raises((ValueError, RuntimeError), match=r"^[^:\n]+: (give|make) [^:\n]+\.$"):
            operator(*all_given)
        for each, was in before.items():
            assert torch.equal(given[each], was)


def test_encode_refuses_a_table_with_epochs():
    given = arguments()
    rest = (given["table"], given["key"], [0] * 4, given["kept"])
    for operator in (codec.encode, torch.ops.qsdp.encode):
        with pytest.raises((ValueError, RuntimeError), match="encode_changes"):
            operator(given["buffer"], *rest)
    assert not given["kept"].any()


def test_the_operators_pass_torchs_own_checks():
    given = arguments()
    torch.library.opcheck(torch.ops.qsdp.encode_changes, tuple(given.values()))
    torch.ops.qsdp.encode_changes(*given.values())
    body = given["frame"][: given["counts"][0]].clone()
    torch.library.opcheck(
        torch.ops.qsdp.apply_changes, (body, given["table"], given["step"], given["kept"])
    )
