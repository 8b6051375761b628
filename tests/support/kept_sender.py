"""A shard and the row that is kept of it, for tests of changes: kernels must say them alike."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from qsdp.codec.change_frame import most_body_bytes
from qsdp.codec.payload import Layout, Segment
from qsdp.common.dtypes import DType
from qsdp.ops.reference import changes, codec
from qsdp.ops.reference.apply_changes import apply_changes
from qsdp.ops.reference.changes import encode_changes
from tests.support.kernel_inputs import assert_canaries, assert_same_values, off_by

FLOATS = (DType.FP32, DType.BF16, DType.FP16)
LENGTHS = (0, 1, 7, 9, 63, 128, 129, 300)
BUCKETS = (8, 16, 40, 64, 120, 128)
ROOM = 0.25


def some(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def layout_of(
    dtype: DType, rounding: int, generator: torch.Generator, lengths: tuple[int, ...] = LENGTHS
) -> Layout:
    """Coded segments of all bits and of such lengths, and raw ones among them."""
    segments: list[Segment] = []
    for bits, padded in product(range(2, 9), lengths):
        segments.append(
            Segment(
                bits=bits,
                dtype=dtype,
                padded=padded,
                parameter=len(segments),
                bucket=BUCKETS[some(len(BUCKETS), generator)],
                rounding=rounding,
                keeps_epochs=True,
            )
        )
        if len(segments) % 5 == 0:
            wire = FLOATS[some(3, generator)]
            segments.append(Segment(bits=0, dtype=dtype, padded=padded, parameter=0, wire=wire))
    return Layout(segments, group=77)


class Sender:
    """A shard, and the row that is kept of it: what it sends, both kernels must say alike."""

    def __init__(self, layout: Layout, x: Tensor, generator: torch.Generator) -> None:
        self.x, self.generator = x, generator
        self.key, self.step = some(2**62, generator) - 2**61, some(1000, generator)
        numels = [
            segment.padded if some(10, generator) < 7 else segment.padded * 2 // 3
            for segment in layout.segments
        ]
        self.table = torch.tensor(layout.table(numels))
        self.kept, self.whole = off_by(layout.payload_bytes, 3)
        self.kept.zero_()
        rows = changes.kept_rows(self.table)
        for row in rows:
            if row.bits:
                low_and_scale = torch.tensor([torch.nan, 0.0])
                num_buckets = row.meta(self.kept).numel() // 8
                row.meta(self.kept).copy_(low_and_scale.repeat(num_buckets).view(torch.uint8))
        self.most_bytes = most_body_bytes(rows)
        self.modes = torch.full((len(rows),), changes.TRAINED)
        self.num_sent, self.num_changed, self.num_drawn = 0, 0, 0

    def send(self, redraw_every: int) -> Tensor:
        """The body of the frame of this step, which both kernels write and apply alike."""
        rest = (self.kept, self.modes, self.step, redraw_every, ROOM)
        said = []
        for encode in (encode_changes, torch.ops.qsdp.encode_changes):
            frame, whole = off_by(self.most_bytes, 5)
            counts, kept = torch.full((3,), -1), self.kept.clone()
            encode(self.x.view(torch.uint8), self.table, self.key, *rest, frame, counts)
            assert_canaries(whole, frame)
            assert torch.equal(kept, self.kept), "the row itself was changed"
            said.append((frame[: counts[0]], counts))
        (body, counts), (got, got_counts) = said
        assert torch.equal(got_counts, counts)
        assert torch.equal(got, body)
        want = self.kept.clone()
        apply_changes(body, self.table, self.step, want)
        torch.ops.qsdp.apply_changes(body, self.table, self.step, self.kept)
        assert torch.equal(self.kept, want)
        assert_canaries(self.whole, self.kept)
        self.num_sent, self.num_changed, self.num_drawn = counts.tolist()
        return body

    def wander(self, by: float) -> None:
        """A step of a random walk: all values move by about a part ``by`` of the typical one."""
        self.x += torch.randn(self.x.shape, generator=self.generator).mul(by).to(self.x.dtype)
        self.step += 1 + some(2, self.generator)

    def assert_decoded_alike(self) -> None:
        dtype = self.x.dtype
        want, got = torch.full_like(self.x, 3), torch.full_like(self.x, 7)
        for add in (False, True) if dtype == torch.float32 else (False,):
            codec.decode(self.kept, self.table, self.key, want.view(torch.uint8), add)
            torch.ops.qsdp.decode(self.kept, self.table, self.key, got.view(torch.uint8), add)
            assert_same_values(got.view(torch.uint8), want.view(torch.uint8), dtype)
