"""The specification of changes to kept rows: bytes written by hand, frames that are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from qsdp.codec.change_frame import most_body_bytes
from qsdp.codec.payload import Layout, Segment
from qsdp.codec.segment_table import SegmentRow
from qsdp.common.dtypes import DType
from qsdp.common.rounding import Rounding
from qsdp.ops.reference.apply_changes import apply_changes
from qsdp.ops.reference.changes import FROZEN, STILL, TRAINED, encode_changes
from qsdp.ops.reference.codec import decode, encode
from qsdp.ops.reference.packing import pack_codes, unpack_codes
from tests.support.frame_body import BAD, BAD_LENGTH

KEY = 77
ROOM, EVERY = 0.25, 200


class Kept:
    """A kept row with the table of its layout, and the values that it was made of."""

    def __init__(self, *segments: Segment) -> None:
        self.layout = Layout(segments, 2)
        self.table = torch.tensor(self.layout.table([each.padded for each in segments]))
        self.segments = [SegmentRow(row) for row in self.table.tolist()]
        self.row = torch.zeros(self.layout.payload_bytes, dtype=torch.uint8)
        for segment in self.segments:
            if segment.bits:
                segment.meta(self.row).view(torch.float32)[::2] = torch.nan

    def changes(
        self, x: Tensor, step: int, mode: int = TRAINED, every: int = EVERY
    ) -> tuple[bytes, list[int]]:
        """The body that brings the row up to ``x``, and its counts; the row stays."""
        frame = torch.zeros(most_body_bytes(self.segments), dtype=torch.uint8)
        counts = torch.zeros(3, dtype=torch.int64)
        before, modes = self.row.clone(), torch.full((len(self.segments),), mode)
        given = x.view(torch.uint8), self.table, KEY, self.row, modes, step, every, ROOM
        encode_changes(*given, frame, counts)
        assert torch.equal(self.row, before)
        return bytes(frame[: int(counts[0])].tolist()), counts.tolist()

    def apply(self, body: bytes, step: int = 0) -> None:
        """Bring the row up to date by a body."""
        frame = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(0)
        apply_changes(frame.to(torch.uint8), self.table, step, self.row)

    def update(self, x: Tensor, step: int, every: int = EVERY) -> list[int]:
        """Bring the row up to ``x``; returns the counts."""
        body, counts = self.changes(x, step, every=every)
        self.apply(body, step)
        return counts

    def values(self) -> Tensor:
        """What the row is decoded to."""
        out = torch.empty(self.layout.buffer_bytes, dtype=torch.uint8)
        decode(self.row, self.table, KEY, out)
        return out.view(torch.float32)

    def codes(self, i: int = 0) -> Tensor:
        """The codes of a segment."""
        segment = self.segments[i]
        return unpack_codes(segment.data(self.row), segment.bits, segment.numel)

    def set_codes(self, codes: Tensor, i: int = 0) -> None:
        """Replace the codes of a segment."""
        segment = self.segments[i]
        segment.data(self.row).copy_(pack_codes(codes, segment.bits))

    def epochs(self, i: int = 0) -> list[int]:
        """The epochs of a segment's buckets."""
        found = self.segments[i].epochs(self.row)
        assert found is not None
        return found.clone().view(torch.int32).tolist()


def coded(padded: int, bits: int = 4, bucket: int = 32, rounding: int = Rounding.DITHER) -> Segment:
    return Segment(
        bits=bits,
        dtype=DType.FP32,
        padded=padded,
        parameter=3,
        bucket=bucket,
        rounding=rounding,
        keeps_epochs=True,
    )


def raw(padded: int) -> Segment:
    return Segment(bits=0, dtype=DType.FP32, padded=padded, parameter=4)


def normal(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed))


def test_a_first_frame_draws_every_bucket_with_room_on_both_sides() -> None:
    kept, x = Kept(coded(70)), normal(70)
    body, counts = kept.changes(x, step=9)
    low, high = x[:32].min(), x[:32].max()
    d = high / 15 - low / 15
    grid = low - 0.25 * (15 * d), d + 0.5 * d
    assert body[:3] == bytes([1, 0xFF, 0x0F])
    assert body[3:11] == struct.pack("<2f", *grid)
    assert counts == [1 + 2 + 3 * 8 + 35, 0, 3]
    kept.apply(body, 9)
    assert kept.epochs() == [9, 9, 9]
    assert (kept.values() - x).abs().max() <= 0.5 * d * 1.5
    assert kept.changes(x, 9) == (b"\0", [1, 0, 0])  # nothing more in this step


def test_the_dither_of_a_kept_grid_is_named_by_its_epoch() -> None:
    x, decoded = normal(64), []
    for step in (0, 1, 1):
        kept = Kept(coded(64))
        kept.update(x, step)
        decoded.append(kept.values())
    assert not torch.equal(decoded[0], decoded[1])
    assert torch.equal(decoded[1], decoded[2])


def test_codes_have_no_history() -> None:
    x = normal(256)
    straight, roundabout = Kept(coded(256)), Kept(coded(256))
    straight.update(x, 0)
    roundabout.update(x, 0)
    for step in range(1, 6):
        roundabout.update(x * (1 - 0.01 * step), step)
    roundabout.update(x, 6)
    assert roundabout.epochs() == [0] * 8
    assert torch.equal(roundabout.row, straight.row)


SOME = {0: -1, 1: 1, 2: -2, 3: 2, 31: -1, 8: -1, 9: 1}
AS_MAP = b"\x0f\x03\0\x80" + bytes([0b10110001, 0b00010001])


@pytest.mark.parametrize(
    ("bits", "changes", "expected"),
    [
        (4, {}, b"\0"),
        (4, {5: 1}, b"\1\1\5"),
        (4, {5: -1, 9: 2}, b"\1\3\x85\x09\x09"),
        (6, {5: -1, 9: 2}, b"\1\3\x85\x09\x09"),
        # Of 32 values a map takes 4 bytes, and one for four changes: of equals the list is taken.
        (6, dict.fromkeys(range(6), 1), b"\1\6\0\1\2\3\4\5"),
        (6, SOME, b"\1" + bytes([125 + 7]) + AS_MAP),
        # Where nibbles count, it has six bytes for 24 changes: as many as ten entries.
        (5, SOME, b"\1\x09\x80\x01\x82\x82\x03\x03\x88\x09\x9f"),
        (5, SOME | {10: 2}, b"\1\x0c\x0f\x07\0\x80" + bytes([0b10110001, 0b01100001]) + bytes(4)),
        (4, dict.fromkeys(range(25), 1), None),  # 16 bytes of codes, less than room for 64
        (4, dict.fromkeys(range(6), 3), None),  # and less than 18 entries
    ],
)  # fmt: skip
def test_changes_of_a_bucket_take_their_shortest_form(
    bits: int, changes: dict[int, int], expected: bytes | None
) -> None:
    kept, x = Kept(coded(32, bits=bits)), normal(32)
    kept.update(x, 0)
    now = kept.codes()
    before = now.clone()
    for place, by in changes.items():
        room = 2**bits - 1 - int(now[place]) if by < 0 else int(now[place])
        assert room >= abs(by), "the kept code would not be one"
        before[place] = int(now[place]) - by
    kept.set_codes(before)
    body, counts = kept.changes(x, 0)
    whole = b"\1\x0e" + bytes(pack_codes(now, bits).tolist())
    assert body == (whole if expected is None else expected)
    assert counts == [len(body), len(changes), 0]
    kept.apply(body)
    assert torch.equal(kept.codes(), now)


def test_a_raw_segment_travels_when_a_byte_of_it_has_changed() -> None:
    kept, x = Kept(raw(3), coded(32), raw(2)), normal(37)
    kept.update(x, 0)
    assert torch.equal(kept.values()[:3], x[:3])
    x[36] += 1
    body, _ = kept.changes(x, 1)
    assert body == b"\4" + x[35:].numpy().tobytes()
    kept.apply(body, 1)
    assert torch.equal(kept.values()[35:], x[35:])


def left(x: Tensor) -> None:
    x[3] = 9.0


def zero(x: Tensor) -> None:
    x[3] = 0.0


def shrunk(x: Tensor) -> None:
    x[:32] *= 0.3


def broken(x: Tensor) -> None:
    x[3] = torch.inf


@pytest.mark.parametrize("happens", [left, zero, shrunk, broken])
def test_what_a_grid_cannot_hold_has_its_bucket_drawn_again(
    happens: Callable[[Tensor], None],
) -> None:
    kept, x = Kept(coded(64)), normal(64)
    kept.update(x, 0)
    happens(x)
    assert kept.update(x, 1) == [1 + 1 + 8 + 16, 0, 1]
    assert kept.epochs() == [1, 0]
    if happens is broken:
        assert kept.values()[:32].isnan().all()
        assert kept.update(x, 2)[1:] == [0, 0]  # it stays so
        x[3] = 0.5
        assert kept.update(x, 3)[1:] == [0, 1]
    else:
        assert torch.isclose(kept.values()[3], x[3], atol=0.1 if happens is shrunk else 0.5)
        assert kept.update(x, 2)[1:] == [0, 0]
    if happens is zero:
        assert kept.values()[3] == 0
        x[3] = 0.1
        assert kept.update(x, 3)[1:] == [1, 0]  # its code stays free


def test_values_that_were_all_equal_have_no_room() -> None:
    kept, x = Kept(coded(32)), torch.full((32,), 0.3)
    kept.update(x, 0)
    assert torch.equal(kept.values(), x)
    x[7] += 1e-6
    assert kept.update(x, 1)[1:] == [0, 1]


def test_each_bucket_is_due_once_in_every_so_many_steps() -> None:
    every, num = 10, 64
    kept, x = Kept(coded(32 * num)), normal(32 * num)
    kept.update(x, 0, every)
    drawn = [kept.update(x, step, every)[2] for step in range(1, 2 * every + 1)]
    assert sum(drawn[:every]) == sum(drawn[every:]) == num
    assert max(drawn) < num / 2  # spread
    body, _ = kept.changes(x, 1000, FROZEN, every)
    assert body == b"\0"  # never
    assert kept.changes(x * 9, 1000, STILL, every)[0] == b"\0"


def test_a_room_that_is_not_finite_is_left_out() -> None:
    x = torch.linspace(-1, 1, 32) * 3e38
    kept = Kept(coded(32, rounding=Rounding.NEAREST))
    kept.update(x, 0)
    low, scale = kept.segments[0].meta(kept.row).clone().view(torch.float32).tolist()
    assert low == x[0]
    assert np.float32(scale) == x[-1] / 15 - x[0] / 15
    assert kept.values().isfinite().all()


@pytest.mark.parametrize(("bits", "body", "told"), BAD.values(), ids=BAD)
def test_frames_that_cannot_be_are_refused_in_one_sentence(
    bits: int, body: bytes, told: str
) -> None:
    kept = Kept(coded(BAD_LENGTH, bits=bits))
    kept.update(normal(BAD_LENGTH), 0)
    kept.set_codes(torch.full((BAD_LENGTH,), 7, dtype=torch.uint8))
    with pytest.raises(ValueError, match=rf"^a frame .*{told}.*: give what encode_changes wrote"):
        kept.apply(body)


def test_what_is_given_wrongly_is_refused() -> None:
    kept, x = Kept(coded(64)), normal(64)
    plain = Layout([Segment(bits=4, dtype=DType.FP32, padded=64, parameter=3, bucket=32)], 2)
    table = torch.tensor(plain.table([64]))
    frame = torch.zeros(200, dtype=torch.uint8)
    good = {
        "buffer": x.view(torch.uint8), "table": kept.table, "key": KEY, "kept": kept.row,
        "modes": torch.tensor([2]), "step": 0, "redraw_every": EVERY, "room": ROOM, "frame": frame,
        "counts": torch.zeros(3, dtype=torch.int64),
    }  # fmt: skip
    encode_changes(**good)
    for name, value, told in (
        ("table", table, "a coded segment has no epochs"),
        ("step", -1, "step is -1"),
        ("step", 1 << 31, "step is 2147483648"),
        ("modes", torch.tensor([3]), "the modes are"),
        ("modes", torch.tensor([2, 2]), "the modes are"),
        ("redraw_every", 0, "redraw_every is 0"),
        ("room", 0.0, "room 0.0"),
        ("frame", frame[:50], "the frame is"),
        ("counts", torch.zeros(2), "the counts are"),
    ):
        with pytest.raises(ValueError, match=told):
            encode_changes(**good | {name: value})
    header = kept.layout.header(0, 0)
    with pytest.raises(ValueError, match="use encode_changes"):
        encode(x.view(torch.uint8), kept.table, KEY, header, kept.row)
    wide, shifted = Kept(coded(512, bucket=256)), Kept(coded(64, rounding=Rounding.SHIFT))
    with pytest.raises(ValueError, match="buckets of 256 and rounding 1"):
        wide.update(normal(512), 0)
    with pytest.raises(ValueError, match=r"give 2 to 8 bits.*dither \(1\) or nearest \(3\)"):
        shifted.update(x, 0)
