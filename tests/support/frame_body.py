"""What a frame's body says of its own length, read apart from the kernels: see [Note: Changes]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qsdp.codec.payload import META_BYTES
from qsdp.codec.segment_table import SegmentRow
from qsdp.ops.reference import changes

NIBBLES = [*range(12), 149, 189, changes.WHOLE, changes.DRAWN]
"""The count byte that each nibble stands for."""


class Parts(NamedTuple):
    """Where the counts of a body lie, what they are in bytes, and how long it should be."""

    counts: slice
    heads: list[int]
    num_bytes: int


def nums_of(row: SegmentRow) -> list[int]:
    """How many values each bucket of a coded row has."""
    return [min(row.bucket, row.numel - first) for first in range(0, row.numel, row.bucket)]


def data_bytes(head: int, bits: int, num: int) -> int:
    """Bytes of the data of a bucket of ``num`` values."""
    if head >= changes.WHOLE:
        return -(-num * bits // 8) + META_BYTES * (head == changes.DRAWN)
    if head > changes.MOST_LISTED:
        return -(-num // 8) + -(-(head - changes.MOST_LISTED) // 4)
    return head


def counts_of(row: SegmentRow, heads: Sequence[int]) -> bytes:
    """The counts of a row's buckets as they travel."""
    if row.bits > 5:
        return bytes(heads)
    nibbles = [NIBBLES.index(head) for head in heads] + [0] * (len(heads) % 2)
    return bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))


def parts_of(body: bytes, rows: Sequence[SegmentRow]) -> Parts:
    """The parts of a body, which may end early behind its bitmap."""
    changed = [row for i, row in enumerate(rows) if body[i // 8] >> i % 8 & 1]
    start = at = -(-len(rows) // 8) + sum(row.data_bytes for row in changed if not row.bits)
    heads: list[int] = []
    size = 0
    for row in (row for row in changed if row.bits):
        nums = nums_of(row)
        if row.bits > 5:
            own = list(body[at : at + len(nums)])
            at += len(nums)
        else:
            taken = body[at : at + -(-len(nums) // 2)]
            own = [NIBBLES[half] for each in taken for half in (each & 15, each >> 4)][: len(nums)]
            at += -(-len(nums) // 2)
        size += sum(data_bytes(head, row.bits, num) for head, num in zip(own, nums, strict=False))
        heads += own
    return Parts(slice(start, at), heads, at + size)


BAD_LENGTH = 84
"""Values of the only segment that ``BAD`` is about, in buckets of 32, 32 and 20."""
_LIST, _MAP = "lists changes .*of a bucket", "maps .*changes of a bucket"
BAD = {
    "nothing": (4, b"", "of 0 bytes ends before its byte 1"),
    "bits of no segment": (4, b"\2", "has changes of more than 1 segments"),
    "no counts": (4, b"\1\0", "of 2 bytes ends before its byte 3"),
    "no count bytes": (6, b"\1\0\0", "of 3 bytes ends before its byte 4"),
    "a count too many": (4, b"\1\0\x10\0", "counts changes of a bucket that there is not"),
    "no data": (4, b"\1\x10\0", "of 3 bytes ends before its byte 4"),
    "bytes left over": (4, b"\0\0", "of 2 bytes has no more to say after 1"),
    "a place past the last": (4, b"\1\0\1\x14", _LIST),
    "places in no order": (4, b"\1\2\0\5\4", _LIST),
    "up and down": (4, b"\1\2\0\5\x85", _LIST),
    "below 0": (4, b"\1\x08\0" + b"\x85" * 8, "to one that there is not"),
    "above the last": (4, b"\1\x09\0" + b"\5" * 9, "to one that there is not"),
    "more in a map than room": (4, b"\1\x0c\0\xff\xff\xff\1" + bytes(6), _MAP),
    "more than a count byte says": (6, b"\1\x7e\0\0\3\0\0\0\0", _MAP),
    "a map past the last": (4, b"\1\0\x0c\0\0\x10" + bytes(6), _MAP),
    "a map with bits behind": (6, b"\1\x7e\0\0\1\0\0\0\4", _MAP),
    "a map with bits far behind": (4, b"\1\x0c\0\1\0\0\0" + bytes(5) + b"\1", _MAP),
}
"""Bits, a body for codes that are all 7 (4 bits), and what is wrong with it."""
