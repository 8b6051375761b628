"""Slices of flat buffers without what masks prune: every rank's has its own size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import ALIGN_BYTES, Segment
from qsdp.comm.buffers import BufferPool
from qsdp.common import bitmask
from qsdp.common.dtypes import ITEM_BYTES
from qsdp.ops.reference.sparse import Span

_ROOM = 1 << 20
"""Bytes of kept values that are expanded at once: they stay in a core's cache."""


class SliceMasks(NamedTuple):
    """The masks by which all ranks' slices of one parameter are pruned."""

    bits: Tensor
    """uint8 [ranks, bytes], see ``bitmask``: of all parameters of the exchange."""
    start: int
    """The byte of a row where the parameter's own mask starts."""
    counts: list[int]
    """The values that are kept, by rank."""


class PrunedSlices:
    """What is kept of each rank's pruned slice: one segment after another, without a gap.

    ``counts``, int64 [ranks, segments], are the values that are kept; ``width`` is the bytes that
    the longest takes, a whole number of blocks of 16.

    Args:
        segments: Those of a whole slice.
        starts: Their places in it, in bytes; None: one after another.
        masks: Those of each segment's parameter, of one exchange; None where all is kept.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        starts: Sequence[int] | None,
        masks: Sequence[SliceMasks | None],
    ) -> None:
        self._bits = next(each.bits for each in masks if each is not None)
        self._masks, self._segments = masks, segments
        ranks = len(self._bits)
        self.counts = torch.stack(
            [
                torch.full((ranks,), segment.padded) if each is None else torch.tensor(each.counts)
                for segment, each in zip(segments, masks, strict=True)
            ],
            dim=1,
        )
        items = torch.tensor([ITEM_BYTES[segment.dtype] for segment in segments])
        padded = torch.tensor([segment.padded for segment in segments])
        compact_bytes = self.counts * items
        whole_bytes = padded * items
        ends = compact_bytes.cumsum(1)
        self.width = -(-int(ends[:, -1].max()) // ALIGN_BYTES) * ALIGN_BYTES or ALIGN_BYTES
        columns = {
            Span.DENSE_BYTE: whole_bytes.cumsum(0) - whole_bytes
            if starts is None
            else torch.tensor(starts),
            Span.NUMEL: padded,
            Span.ITEM: items,
            Span.BITMAP_BYTE: torch.tensor([-1 if each is None else each.start for each in masks]),
            Span.COMPACT_BYTE: ends - compact_bytes,
            Span.COUNT: self.counts,
        }
        self._spans = torch.stack(
            [columns[column].expand(ranks, len(segments)) for column in Span], dim=2
        )
        self._shifted: dict[tuple[int, int, int], Tensor] = {}

    def has_masks_of(self, other: PrunedSlices) -> bool:
        """Whether the same is kept as of ``other``, whose segments are the same."""
        pairs = zip(self._own_masks(), other._own_masks(), strict=True)
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)

    def _own_masks(self) -> list[Tensor]:
        """uint8 [ranks, bytes] of each segment, of none where all is kept."""
        return [
            self._bits[:, :0]
            if mask is None
            else self._bits[:, mask.start : mask.start + -(-segment.padded // 8)]
            for mask, segment in zip(self._masks, self._segments, strict=True)
        ]

    def kept(self, rank: int, place: int, values: Tensor) -> Tensor:
        """What is kept of one segment's ``values``, the 1-D shard of ``rank``."""
        mask, num = self._masks[place], values.numel()
        if mask is None:
            return values
        own = self._bits[rank, mask.start : mask.start + -(-num // 8)]
        return values[bitmask.unpack(own, num)]

    def compact(
        self, slices: Tensor, first: int, pool: BufferPool, *, strict: bool = False
    ) -> Tensor:
        """What is kept of ``slices``, uint8 [slices, bytes] of the ranks from ``first`` on.

        ``strict``: raise RuntimeError where a pruned value is not zero.

        Returns uint8 [slices, width], valid until the next call with this pool.
        """
        num, size = slices.shape
        out = pool.take("compact", num * self.width, slices.device).view(num, self.width)
        spans, bits = self._spans_of(first, num, size), self._bits[first : first + num].view(-1)
        ops.compact(slices.view(-1), spans, bits, out.view(-1), strict)
        return out

    def expand(self, compact: Tensor, first: int, slices: Tensor) -> None:
        """Fill ``slices`` from what ``compact`` gives, with zeros where values are pruned."""
        num, size = slices.shape
        spans, bits = self._spans_of(first, num, size), self._bits[first : first + num].view(-1)
        ops.expand(compact.view(-1), spans, bits, slices.view(-1))

    @property
    def at_once(self) -> int:
        """How many ranks' slices to ``expand`` in one call."""
        return max(1, _ROOM // self.width)

    def _spans_of(self, first: int, num: int, size: int) -> Tensor:
        """int64 [num * segments, len(Span)], the spans of the ranks ``first`` to ``first + num``.

        Their slices, of ``size`` bytes, lie one after another.
        """
        found = self._shifted.get((first, num, size))
        if found is None:
            found = self._spans[first : first + num].clone()
            rows = torch.arange(num)[:, None]
            found[:, :, Span.DENSE_BYTE] += rows * size
            found[:, :, Span.COMPACT_BYTE] += rows * self.width
            masked = found[:, :, Span.BITMAP_BYTE]
            masked += rows * self._bits.shape[1] * (masked >= 0)
            found = self._shifted[first, num, size] = found.flatten(0, 1)
        return found
