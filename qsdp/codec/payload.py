"""[Note: Payload] The bytes that one rank sends for one group, in numbers or arrays of them.

    header   32 bytes, four little-endian int64: (version << 32 | sender), key step,
             payload bytes, plan hash ^ status; the hash is ``payload_hash`` of the version, the
             group and what defines each segment, the status is 0 but where a rank has other
             gradients than were agreed on: [Note: Consensus] in comm/gradient_consensus.py
    metadata 8 bytes a bucket, segment after segment: fp32 min, fp32 scale; where a segment keeps
             epochs ([Note: Changes]) these follow its buckets', an int32 each
    raw      the uncoded segments, wider elements first
    codes    from a 16-byte boundary on, segment after segment, each ceil(numel * bits / 8) bytes:
             a little-endian bit stream, value i at bits [i * bits, (i + 1) * bits)

A payload's size is a multiple of 16 bytes, so that the next rank's payload is aligned too. Offsets
follow from the padded sizes and are the same on every rank; how many values of a segment are valid
is the sender's own (an uneven shard's padding is neither measured nor coded).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qsdp.common.dtypes import ITEM_BYTES, DType

VERSION = 3
HEADER_BYTES = 32
META_BYTES = 8
EPOCH_BYTES = 4
ALIGN_BYTES = 16


class PayloadStatus(IntEnum):
    """A word in every payload: what it says of its sender's gradients.

    They are those that were agreed on, or others, or the sender has heard of both; or it has
    nothing to send, and raises. The values are random bits, so that damage is not taken for a
    status.
    """

    KEPT = 0
    CHANGED = 0x3C6EF372FE94F82A
    MIXED = 0x510E527FADE682D1
    FAILED = 0x1F83D9ABFB41BD6B


Count = TypeVar("Count", int, npt.NDArray[np.int64])
"""How many values or bytes: of one rank, or of each."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One parameter's stretch of a payload. ``bits`` 0 is raw: it travels as ``wire``.

    ``levels`` is where the segment's learned levels start in the tensor that ``encode`` and
    ``decode`` are given; -1 stands for the uniform grid. ``keeps_epochs``: its payload is kept, and
    each bucket has the step at which its grid was drawn. ``rotates_in`` is in how large buckets its
    values are rotated before they are coded ([Note: Rotation]); 0: they are coded as they are.
    """

    bits: int
    dtype: DType
    padded: int
    parameter: int
    wire: DType = DType.FP32
    bucket: int = 1024
    rounding: int = 0
    levels: int = -1
    keeps_epochs: bool = False
    rotates_in: int = 0

    @property
    def definition(self) -> tuple[int, ...]:
        """All fields in an order of its own, which is part of the version of payloads."""
        travels = (self.bits, self.dtype, self.wire, self.padded, self.parameter)
        kept = [1] if self.keeps_epochs else []
        rotated = [2, self.rotates_in] if self.rotates_in else []
        return (*travels, self.bucket, self.rounding, self.levels, *kept, *rotated)

    def meta_bytes(self, count: Count) -> Count:
        """Bytes of the metadata of ``count`` values."""
        a_bucket = META_BYTES + EPOCH_BYTES * self.keeps_epochs
        return -(-count // self.bucket) * a_bucket if self.bits else count * 0

    def epochs_start(self, meta_start: Count, count: Count) -> Count:
        """Where the epochs of ``count`` values' buckets start, or -1 where there are none."""
        if not self.keeps_epochs:
            return meta_start * 0 - 1
        return meta_start + -(-count // self.bucket) * META_BYTES

    def data_bytes(self, count: Count) -> Count:
        """Bytes of the codes of ``count`` values, or of these as they are."""
        if self.bits:
            return -(-count * self.bits // 8)
        return count * ITEM_BYTES[self.wire]


class Layout:
    """The form of one payload: where each segment of a group lies in it, and in the flat buffer.

    ``segments`` are in buffer order; ``group`` numbers the group for the random generator.
    """

    def __init__(self, segments: Sequence[Segment], group: int) -> None:
        self.segments = tuple(segments)
        self.group = group
        self.num_values = sum(segment.padded for segment in segments)
        self.buffer_bytes = sum(s.padded * ITEM_BYTES[s.dtype] for s in segments)
        starts = payload_offsets(segments, [segment.padded for segment in segments])
        meta_starts, data_starts, self.payload_bytes = starts
        self._starts = tuple(zip(meta_starts, data_starts, strict=True))
        self.hash = payload_hash([VERSION, group, *(n for s in segments for n in s.definition)])

    def table(self, numels: Sequence[int], dtype: DType | None = None) -> list[list[int]]:
        """Rows of a segment table for one sender whose segments hold ``numels`` valid values.

        Their columns are those of ``Field`` in ``codec/segment_table.py``. ``dtype`` replaces the
        buffer's own dtype: a bf16 gradient is decoded into fp32.
        """
        rows, buffer_byte = [], 0
        for segment, numel, (meta, data) in zip(self.segments, numels, self._starts, strict=True):
            own = segment.dtype if dtype is None else dtype
            row = [segment.bits, own, segment.wire, buffer_byte, numel, segment.padded]
            row += [segment.bucket, segment.rounding, meta, data, segment.parameter, self.group]
            row += [segment.levels, segment.epochs_start(meta, segment.padded)]
            rows.append([int(entry) for entry in row])
            buffer_byte += segment.padded * ITEM_BYTES[own]
        return rows

    def header(
        self, sender: int, step: int, status: PayloadStatus = PayloadStatus.KEPT
    ) -> list[int]:
        """The four int64 words that open a payload of this layout."""
        return [VERSION << 32 | sender, step, self.payload_bytes, self.hash ^ status]


def payload_offsets(
    segments: Sequence[Segment], counts: Sequence[Count]
) -> tuple[list[Count], list[Count], Count]:
    """Where each segment's metadata and data start in a payload, and the payload's bytes.

    Its segments reserve ``counts`` values.
    """
    end: Any = HEADER_BYTES
    meta_starts, data_starts = [], [end] * len(segments)
    for segment, count in zip(segments, counts, strict=True):
        meta_starts.append(end)
        end = end + segment.meta_bytes(count)
    raw = [i for i, segment in enumerate(segments) if not segment.bits]
    for i in sorted(raw, key=lambda i: -ITEM_BYTES[segments[i].wire]):
        data_starts[i] = end
        end = end + segments[i].data_bytes(counts[i])
    end = _align(end)
    for i, segment in enumerate(segments):
        if segment.bits:
            data_starts[i] = end
            end = end + segment.data_bytes(counts[i])
    return meta_starts, data_starts, _align(end)


def payload_hash(integers: Sequence[int]) -> int:
    """The hash in a payload's first bytes: of ``integers``, signed, 64 bits.

    It depends on no name of a class or a field.
    """
    packed = struct.pack(f"<{len(integers)}q", *integers)
    return int.from_bytes(blake2b(packed, digest_size=8).digest(), "little", signed=True)


def _align(num_bytes: Count) -> Count:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
