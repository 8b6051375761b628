"""The reference kernel of changes to kept rows: the specification of ``encode_changes``.

[Note: Changes] Every rank keeps the payload of each rank's shard (a row), with an epoch for each
bucket: the step at which its grid was drawn. A frame brings a row up to the weights of now.

    grid     drawn as in [Note: Grid], then with room r on both sides: d = d0 + (2 r) d0,
             lo = lo0 - r (steps d0). Where that is not finite, d0 and lo0.
    code     that of the weight of now on the bucket's grid, with numbers that are drawn by its
             epoch: a function of weight and grid, without a history
    again    a grid is drawn again where values leave it or reach over less than a quarter of it,
             with the bucket's first zero, where it begins or ceases to hold a NaN or an Inf, and
             every ``redraw_every`` steps, each at another one

Only the sender decides. Of each bucket it sends what differs from its row, in a body of bytes:

    bitmap   a bit a segment: whether any of it has changed
    raw      the changed uncoded segments, as they are
    counts   of each changed coded segment: a byte a bucket, or a nibble (half a byte, the lower one
             first) where codes have 5 bits or fewer, of which few change
    data     of its buckets, one after the other, as their counts say

    byte        nibble   data
    0           0        none: the bucket is as it was
    1 to 125    1 to 11  LIST: a byte an entry, in order of place: seven bits place, one bit down.
                         A code that changes by n has n entries
    126 to 253  12, 13   MAP with room for byte - 125 changes: a bit a value; two bits, down and by
                         two, for each that changes; 0 for the room that is left. Of nibbles the
                         room is 24, 64
    254         14       WHOLE: all codes, packed
    255         15       DRAWN: min and scale, fp32, of a new grid whose epoch is the step, and all
                         codes

Of LIST, MAP (for codes that change by two at most) and WHOLE the shortest that has a count is
taken, the first of equals. Nothing is aligned, and unused bits are 0.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qsdp.codec.change_frame import MOST_STEPS, counts_in_nibbles, most_body_bytes
from qsdp.codec.segment_table import SegmentRow, check_table
from qsdp.ops.reference.grid import measure
from qsdp.ops.reference.kept_grids import KeptGrids, codes_now, grids_now, kept_grids
from qsdp.ops.reference.packing import convert_values, pack_codes, unpack_codes

MOST_LISTED = 125
WHOLE = 254
DRAWN = 255
OF_NIBBLE = np.array([*range(12), MOST_LISTED + 24, MOST_LISTED + 64, WHOLE, DRAWN], np.uint8)
"""The count byte that a nibble stands for."""
STILL, FROZEN, TRAINED = range(3)
"""How a segment is looked at: not at all; without a schedule; with one."""

Bytes = npt.NDArray[np.uint8]


def encode_changes(
    buffer: Tensor,
    table: Tensor,
    key: int,
    kept: Tensor,
    modes: Tensor,
    step: int,
    redraw_every: int,
    room: float,
    frame: Tensor,
    counts: Tensor,
) -> None:
    """The specification of ``encode_changes``: write what brings a kept row up to the weights.

    Args:
        buffer: uint8 [bytes], contiguous: the flat buffer viewed as bytes.
        table: int64 [segments, len(Field)] on the CPU, of the kept row.
        key: The folded ``RandomKey``.
        kept: uint8 [row bytes], contiguous: what all ranks keep of this shard. It stays as it is.
        modes: int64 [segments] on the CPU: ``STILL``, ``FROZEN`` or ``TRAINED``.
        step: The epoch of grids that are drawn now, 0 to 2**31 - 1.
        redraw_every: Steps after which a trained bucket is drawn again.
        room: What a new grid leaves free on each side, as a part of the range.
        frame: uint8 [most_body_bytes or more], contiguous: the body of [Note: Changes].
        counts: int64 [3] on the CPU, overwritten: the body's bytes, codes that changed in buckets
            that were not drawn again, and buckets that were.
    """
    check_table(buffer, table, kept)
    rows = kept_rows(table)
    check_step(step)
    _check_modes(modes, len(rows))
    if redraw_every < 1 or not 0 < room <= 1:
        raise ValueError(
            f"redraw_every is {redraw_every} and room {room}: give at least 1, and more than 0 and "
            "at most 1."
        )
    if frame.dtype != torch.uint8 or frame.dim() != 1 or frame.numel() < most_body_bytes(rows):
        raise ValueError(
            f"the frame is {frame.dtype} of shape {tuple(frame.shape)}: "
            f"give a 1-D uint8 buffer of {most_body_bytes(rows)} bytes or more."
        )
    if counts.dtype != torch.int64 or counts.shape != (3,) or counts.device.type != "cpu":
        raise ValueError(
            f"the counts are {counts.dtype} of shape {tuple(counts.shape)}: give int64 [3] on the "
            "cpu."
        )
    bitmap = np.zeros(-(-len(rows) // 8), dtype=np.uint8)
    raw: list[bytes] = []
    heads: list[Bytes] = []
    data: list[bytes] = []
    num_changed = num_drawn = 0
    for i, (segment, mode) in enumerate(zip(rows, modes.tolist(), strict=True)):
        if mode == STILL or not segment.numel:
            continue
        values, was = segment.values(buffer), segment.data(kept)
        if not segment.bits:
            now = convert_values(values, segment.wire).view(torch.uint8)
            if torch.equal(now, was):
                continue
            raw.append(_bytes_of(now))
        else:
            grids = kept_grids(segment, kept)
            extent = measure(values.float(), segment)
            new = grids_now(extent, grids, segment, step, redraw_every * (mode == TRAINED), room)
            codes = codes_now(extent, new, segment, key)
            old = _in_buckets(unpack_codes(was, segment.bits, segment.numel), segment)
            head, of_buckets, changed = _say(segment, codes, old, new, grids.differ(new))
            if not head.any():
                continue
            num_drawn += int((head == DRAWN).sum())
            heads.append(_nibbles(head) if counts_in_nibbles(segment) else head)
            data += of_buckets
            num_changed += changed
        bitmap[i // 8] |= 1 << i % 8
    body = b"".join([bitmap.tobytes(), *raw, *(head.tobytes() for head in heads), *data])
    frame[: len(body)].copy_(torch.frombuffer(bytearray(body), dtype=torch.uint8))
    counts.copy_(torch.tensor([len(body), num_changed, num_drawn]))


def _say(
    segment: SegmentRow, codes: Tensor, old: Tensor, new: KeptGrids, is_drawn: Tensor
) -> tuple[Bytes, list[bytes], int]:
    """The count bytes of a segment, the data of its buckets, and how many codes have changed.

    ``codes`` and ``old`` are int64 [buckets, bucket], those of now and the kept ones.
    """
    delta = (codes - old).cpu().numpy()
    head = np.zeros(len(delta), dtype=np.uint8)
    counts = OF_NIBBLE.tolist() if counts_in_nibbles(segment) else range(DRAWN)
    data, num_changed = [], 0
    drawn = is_drawn.cpu().numpy()
    for b in np.flatnonzero(drawn | delta.any(1)).tolist():
        num = min(segment.bucket, segment.numel - b * segment.bucket)
        packed = _bytes_of(pack_codes(codes[b, :num].to(torch.uint8), segment.bits))
        if drawn[b]:
            head[b] = DRAWN
            grid = torch.stack((new.low[b], new.scale[b])).view(torch.uint8)
            data += [_bytes_of(grid), packed]
            continue
        places = np.flatnonzero(delta[b])
        by = delta[b, places]
        num_changed += len(places)
        forms = [(WHOLE, packed)]
        of_map = counts[bisect_left(counts, MOST_LISTED + len(places))]
        if of_map < WHOLE and abs(by).max() <= 2:
            forms.insert(0, (of_map, _map(places, by, num, room=of_map - MOST_LISTED)))
        if (num_entries := int(abs(by).sum())) <= MOST_LISTED and num_entries in counts:
            entries = (places | (by < 0) << 7).astype(np.uint8).repeat(abs(by))
            forms.insert(0, (num_entries, entries.tobytes()))
        head[b], shortest = min(forms, key=lambda form: len(form[1]))
        data.append(shortest)
    return head, data, num_changed


def _map(places: npt.NDArray[np.int64], by: npt.NDArray[np.int64], num: int, room: int) -> bytes:
    where, how = np.zeros(num, dtype=np.uint8), np.zeros((room, 2), dtype=np.uint8)
    where[places] = 1
    how[: len(by)] = np.stack((by < 0, abs(by) == 2), axis=1)
    both = (np.packbits(each, bitorder="little") for each in (where, how))
    return b"".join(each.tobytes() for each in both)


def _nibbles(head: Bytes) -> Bytes:
    """Count bytes as nibbles, two a byte."""
    found = np.zeros(len(head) + len(head) % 2, dtype=np.uint8)
    found[: len(head)] = np.searchsorted(OF_NIBBLE, head)
    return (found[::2] + 16 * found[1::2]).astype(np.uint8)


def kept_rows(table: Tensor) -> list[SegmentRow]:
    """The rows of a checked table; raises ValueError where it is not one of a kept row."""
    rows = [SegmentRow(row) for row in table.tolist()]
    for segment in rows:
        if segment.bits and not segment.has_epochs:
            raise ValueError(
                "a coded segment has no epochs, as none of a kept row has: give the table of a "
                "layout whose segments keep them."
            )
    return rows


def check_step(step: int) -> None:
    """Raise ValueError where changes cannot have ``step`` for an epoch."""
    if not 0 <= step < MOST_STEPS:
        raise ValueError(f"step is {step}: give 0 to 2**31 - 1, as epochs are of 32 bits.")


def _check_modes(modes: Tensor, num_segments: int) -> None:
    if modes.dtype != torch.int64 or modes.shape != (num_segments,) or modes.device.type != "cpu":
        raise ValueError(
            f"the modes are {modes.dtype} of shape {tuple(modes.shape)}: give int64 "
            f"[{num_segments}] on the cpu."
        )
    if num_segments and not STILL <= int(modes.min()) <= int(modes.max()) <= TRAINED:
        raise ValueError(f"the modes are {modes.tolist()}: give 0 to {TRAINED} each.")


def _in_buckets(codes: Tensor, segment: SegmentRow) -> Tensor:
    """uint8 [n] codes as int64 [buckets, bucket], 0 behind the last."""
    padding = -codes.numel() % segment.bucket
    return torch.nn.functional.pad(codes, (0, padding)).view(-1, segment.bucket).long()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
