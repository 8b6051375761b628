"""Flat buffers without the values that a mask prunes: what a payload of sparse weights is made of.

``compact`` copies the values that are kept, segment after segment; ``expand`` puts them back, with
+0.0 elsewhere. This is the specification in plain PyTorch; csrc/ gives the same bytes.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from qsdp.common import bitmask


class Span(IntEnum):
    """Columns of the int64 table of spans, by which sparse buffers are compacted and expanded."""

    DENSE_BYTE = 0  # where the segment starts in the dense buffer
    NUMEL = 1  # values that the dense buffer reserves for it
    ITEM = 2  # bytes a value: 1, 2 or 4
    BITMAP_BYTE = 3  # where its mask starts in the bitmap; -1: all values are kept
    COMPACT_BYTE = 4  # where it starts in the compact buffer
    COUNT = 5  # values that are kept


def compact(dense: Tensor, spans: Tensor, bitmap: Tensor, out: Tensor, strict: bool) -> None:
    """The reference of ``compact``: copy the kept values of ``dense`` into ``out``.

    Args:
        dense, out: uint8 [bytes], contiguous.
        spans: int64 [segments, len(Span)] on the CPU.
        bitmap: uint8 [bytes]: the masks, see ``bitmask``.
        strict: Raise RuntimeError where a value that is not kept has a bit set: +0.0 has none.
    """
    for row in _checked_rows(dense, spans, bitmap, out):
        values = _values(dense, row, Span.DENSE_BYTE, row[Span.NUMEL])
        target = _values(out, row, Span.COMPACT_BYTE, row[Span.COUNT])
        if row[Span.BITMAP_BYTE] < 0:
            target.copy_(values)
            continue
        keep = _mask_of_row(bitmap, row)
        if strict and bool(values[~keep].any()):
            raise RuntimeError(_STRAY)
        target.copy_(values[keep])


def expand(compact: Tensor, spans: Tensor, bitmap: Tensor, out: Tensor) -> None:
    """The reference of ``expand``: put kept values back into ``out``, among zeros.

    Args as in ``compact``.
    """
    for row in _checked_rows(out, spans, bitmap, compact):
        values = _values(compact, row, Span.COMPACT_BYTE, row[Span.COUNT])
        target = _values(out, row, Span.DENSE_BYTE, row[Span.NUMEL])
        if row[Span.BITMAP_BYTE] < 0:
            target.copy_(values)
        else:
            target.zero_()
            target[_mask_of_row(bitmap, row)] = values


_STRAY = (
    "a weight outside the mask is not zero, and the sparse wire would drop it: tell the handle of "
    "another support (set_support) after editing weights."
)


def _checked_rows(dense: Tensor, spans: Tensor, bitmap: Tensor, compact: Tensor) -> list[list[int]]:
    for name, tensor in (("dense buffer", dense), ("bitmap", bitmap), ("compact buffer", compact)):
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"the {name} is {tensor.dtype} of shape {tuple(tensor.shape)}: "
                "give a contiguous 1-D uint8 view."
            )
    if spans.dtype != torch.int64 or spans.device.type != "cpu" or spans.dim() != 2:
        raise ValueError(f"the spans are {spans.dtype} on {spans.device}: give int64 on the cpu.")
    if spans.shape[1] != len(Span):
        raise ValueError(f"the spans have {spans.shape[1]} columns: give {len(Span)}.")
    rows: list[list[int]] = spans.tolist()
    for row in rows:
        dense_byte, numel, item, bitmap_byte, compact_byte, count = row
        fits = item in (1, 2, 4) and 0 <= count <= numel
        fits = fits and min(dense_byte, compact_byte) >= 0 and bitmap_byte >= -1
        fits = fits and dense_byte + numel * item <= dense.numel()
        fits = fits and compact_byte + count * item <= compact.numel()
        if bitmap_byte < 0:
            fits = fits and count == numel
        elif fits and bitmap_byte + -(-numel // 8) <= bitmap.numel():
            fits = int(_mask_of_row(bitmap, row).sum()) == count
        else:
            fits = False
        if not fits:
            raise ValueError(
                f"a span of {count} of {numel} values reaches outside its buffers or does not "
                "match its mask: make spans, bitmap and buffers from one support."
            )
    return rows


def _mask_of_row(bitmap: Tensor, row: list[int]) -> Tensor:
    numel = row[Span.NUMEL]
    return bitmask.unpack(bitmap.narrow(0, row[Span.BITMAP_BYTE], -(-numel // 8)), numel)


def _values(buffer: Tensor, row: list[int], start: Span, num: int) -> Tensor:
    """uint8 [num, bytes a value], a view."""
    return buffer.narrow(0, row[start], num * row[Span.ITEM]).view(num, row[Span.ITEM])
