"""The reference kernel that applies changes: the specification of ``apply_changes``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qsdp.codec.change_frame import counts_bytes, counts_in_nibbles
from qsdp.codec.payload import META_BYTES
from qsdp.codec.segment_table import SegmentRow, check_table
from qsdp.ops.reference.changes import (
    DRAWN,
    MOST_LISTED,
    OF_NIBBLE,
    WHOLE,
    Bytes,
    check_step,
    kept_rows,
)
from qsdp.ops.reference.packing import pack_codes, unpack_codes


def apply_changes(frame: Tensor, table: Tensor, step: int, kept: Tensor) -> None:
    """The specification of ``apply_changes``: bring a kept row up to what its owner has sent.

    Any bytes may come: ValueError says what is wrong with them, and nothing outside is touched.

    Args:
        frame: uint8 [body bytes], contiguous: a body of [Note: Changes], and no byte more.
        table: int64 [segments, len(Field)] on the CPU, of the kept row.
        step: The epoch of grids that were drawn for this frame.
        kept: uint8 [row bytes], contiguous: the row, which is changed. After an error a part may
            be.
    """
    if frame.dtype != torch.uint8 or frame.dim() != 1 or not frame.is_contiguous():
        raise ValueError(
            f"the frame is {frame.dtype} of shape {tuple(frame.shape)}: "
            "give a contiguous 1-D uint8 view."
        )
    check_table(None, table, kept)
    rows = kept_rows(table)
    check_step(step)
    body = _Body(frame.cpu().numpy())
    is_changed = np.unpackbits(body.take(-(-len(rows) // 8)), bitorder="little")
    if is_changed[len(rows) :].any():
        raise _refusal(f"has changes of more than {len(rows)} segments")
    changed = [segment for segment, bit in zip(rows, is_changed, strict=False) if bit]
    for segment in changed:
        if not segment.bits:
            values = torch.from_numpy(body.take(segment.data_bytes))
            segment.data(kept).copy_(values)
    coded = [segment for segment in changed if segment.bits]
    heads = [_counts(body, segment) for segment in coded]
    for segment, head in zip(coded, heads, strict=True):
        _apply(body, segment, head, step, kept)
    body.end()


def _refusal(fault: str) -> ValueError:
    return ValueError(f"a frame {fault}: give what encode_changes wrote for this table.")


class _Body:
    """The bytes of a frame's body, taken one after the other."""

    def __init__(self, frame: Bytes) -> None:
        self._frame, self._at = frame, 0

    def take(self, num: int) -> Bytes:
        """The next ``num`` bytes, a copy."""
        end = self._at + num
        if end > len(self._frame):
            raise _refusal(f"of {len(self._frame)} bytes ends before its byte {end}")
        taken = self._frame[self._at : end].copy()
        self._at = end
        return taken

    def end(self) -> None:
        """Raise ValueError unless all bytes were taken."""
        if self._at != len(self._frame):
            raise _refusal(f"of {len(self._frame)} bytes has no more to say after {self._at}")


def _counts(body: _Body, segment: SegmentRow) -> Bytes:
    """The count bytes of a segment's buckets."""
    taken, num = body.take(counts_bytes(segment)), segment.num_buckets
    if not counts_in_nibbles(segment):
        return taken
    nibbles = np.stack((taken & 15, taken >> 4), axis=1).ravel()
    if nibbles[num:].any():
        raise _refusal("counts changes of a bucket that there is not")
    return OF_NIBBLE[nibbles[:num]]


def _apply(body: _Body, segment: SegmentRow, head: Bytes, step: int, kept: Tensor) -> None:
    """Apply the data of one segment's buckets, whose count bytes are ``head``."""
    packed, meta, epochs = (
        part.clone().cpu().numpy()
        for part in (segment.data(kept), segment.meta(kept), segment.epochs(kept))
        if part is not None
    )
    for b in np.flatnonzero(head).tolist():
        num = min(segment.bucket, segment.numel - b * segment.bucket)
        start = b * segment.bucket * segment.bits // 8
        own = packed[start : start + -(-num * segment.bits // 8)]
        if head[b] >= WHOLE:
            if head[b] == DRAWN:
                meta[META_BYTES * b : META_BYTES * (b + 1)] = body.take(META_BYTES)
                epochs.view(np.int32)[b] = step
            own[:] = body.take(len(own))
            continue
        codes = unpack_codes(torch.from_numpy(own.copy()), segment.bits, num).numpy().astype(int)
        codes += (
            _listed(body, int(head[b]), num)
            if head[b] <= MOST_LISTED
            else _mapped(body, int(head[b]) - MOST_LISTED, num)
        )
        if codes.min() < 0 or codes.max() >= segment.num_codes:
            raise _refusal(f"changes a code of {segment.bits} bits to one that there is not")
        own[:] = pack_codes(torch.from_numpy(codes.astype(np.uint8)), segment.bits).numpy()
    for part, now in zip(
        (segment.data(kept), segment.meta(kept), segment.epochs(kept)),
        (packed, meta, epochs),
        strict=True,
    ):
        if part is not None:
            part.copy_(torch.from_numpy(now))


def _listed(body: _Body, num_entries: int, num: int) -> npt.NDArray[np.int64]:
    """int64 [num]: by what the codes of a bucket change, as a LIST says."""
    entries = body.take(num_entries).astype(int)
    places, downs = entries & 127, entries >> 7
    steps = np.diff(places)
    if places[-1] >= num or (steps < 0).any() or (np.diff(downs)[steps == 0] != 0).any():
        raise _refusal(
            f"lists changes {entries.tolist()} of a bucket of {num} values, in no order "
            f"of place, or up and down"
        )
    return np.bincount(places, 1 - 2 * downs, num).astype(int)


def _mapped(body: _Body, room: int, num: int) -> npt.NDArray[np.int64]:
    """int64 [num]: by what the codes of a bucket change, as a MAP with room for some says."""
    where = np.unpackbits(body.take(-(-num // 8)), bitorder="little")
    how = np.unpackbits(body.take(-(-room // 4)), bitorder="little")
    num_changed = int(where.sum())
    if where[num:].any() or num_changed > room or how[2 * num_changed :].any():
        raise _refusal(
            f"maps {num_changed} changes of a bucket of {num} values, with room for {room}, or has "
            "bits of others"
        )
    down, by_two = how[: 2 * num_changed].astype(int).reshape(-1, 2).T
    changes = np.zeros(num, dtype=int)
    changes[where[:num] == 1] = (1 - 2 * down) * (1 + by_two)
    return changes
