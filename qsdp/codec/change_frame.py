"""[Note: Frame] What one rank sends of a group's changes: a header, and a body of [Note: Changes].

    header   56 bytes, seven little-endian int64: (version << 32 | sender), key step, bytes of the
             frame, hash ^ status, the digest of all frames before, codes that changed, buckets
             that were drawn again; hash and status are those of [Note: Payload]
    body     as ``encode_changes`` writes it

An all-gather takes the same number of bytes of each rank, and how many change no rank knows of the
others. So all send the beginning of their frames, as many bytes as those of before let expect, and
where any is longer, the rest in one more all-gather: every rank reads every header.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import isqrt

from qsdp.codec.payload import META_BYTES
from qsdp.codec.segment_table import SegmentRow

FRAME_HEADER_WORDS = 7
FRAME_HEADER_BYTES = 8 * FRAME_HEADER_WORDS
MOST_STEPS = 1 << 31
"""Steps of the keys' clock for which there are epochs, of 32 bits."""
_ALIGN = 64
_REMEMBERED = 4
_NIBBLE_BITS = 5
"""Of codes, of which so few change in a bucket that half a byte counts them."""


def bitmap_bytes(num_segments: int) -> int:
    """Bytes of the bitmap of a frame's body."""
    return -(-num_segments // 8)


def counts_in_nibbles(row: SegmentRow) -> bool:
    """Whether a body has half a byte for the count of a bucket of a coded segment."""
    return row.bits <= _NIBBLE_BITS


def counts_bytes(row: SegmentRow) -> int:
    """Bytes of the counts of a coded segment that has changed."""
    return -(-row.num_buckets // 2) if counts_in_nibbles(row) else row.num_buckets


def most_body_bytes(rows: Sequence[SegmentRow]) -> int:
    """Bytes that ``encode_changes`` works in: no body has more."""
    heads = sum(row.num_buckets * (1 + META_BYTES) for row in rows if row.bits)
    return bitmap_bytes(len(rows)) + heads + sum(row.data_bytes for row in rows)


class FrameSizes:
    """The frame sizes of one kind of gather, and how long the next are let be.

    A function of what all ranks have read alike.

    Args:
        first: Bytes that the first frame may be expected to have.
        most: Bytes that no frame has more of.
    """

    def __init__(self, first: int, most: int) -> None:
        self._longest = deque[int](maxlen=_REMEMBERED)
        self._first, self._most = first, most

    @property
    def expected(self) -> int:
        """Bytes that every rank sends at once of its next frame: a little more than of the last.

        Counts of changes scatter by their square root.
        """
        longest = max(self._longest, default=self._first)
        more = min(longest // 16, 4 * isqrt(longest))
        return min(_up(longest + more, _ALIGN), _up(self._most, 16))

    def saw(self, longest: int) -> None:
        """Learn how long the longest frame of a gather was."""
        self._longest.append(longest)


def _up(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple
