"""One direction of one group: its layout, and the codec's tables for every rank's slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import VERSION, Field, Layout, Segment, Status, hash_of
from qsdp.comm.buffers import BufferPool
from qsdp.common import bitmask
from qsdp.common.dtypes import ITEM_BYTES, DType
from qsdp.ops.reference.sparse import Span


class GroupLayout:
    """One direction of a group, with the codec tables of every rank.

    Args:
        layouts: by rank, of its slice.
        numels: by rank the valid values of each segment of its slice.
        starts: the segments' places in the flat buffer, in bytes: a layout may leave out some of
            the buffer's parameters.
    """

    is_sparse = False

    def __init__(
        self,
        layouts: Sequence[Layout],
        numels: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
    ) -> None:
        self._layouts, self._numels = layouts, numels
        self._hash = layouts[0].hash
        self.payload_bytes = max(layout.payload_bytes for layout in layouts)
        """Of every rank."""
        self.tables = self._tables(None, starts)
        self.num_values = sum(map(sum, numels))
        """Of all ranks together, padding left out; pruned ones count."""

    @cached_property
    def fp32_tables(self) -> list[Tensor]:
        """The same tables for a flat buffer in fp32."""
        return self._tables(DType.FP32)

    def _tables(self, dtype: DType | None, starts: Sequence[int] | None = None) -> list[Tensor]:
        """By rank; those of equal slices, as most are, are one tensor."""
        made: dict[tuple[int, ...], Tensor] = {}
        tables = []
        for layout, numels in zip(self._layouts, self._numels, strict=True):
            key = (id(layout), *numels)
            if key not in made:
                made[key] = torch.tensor(layout.table(numels, dtype), dtype=torch.int64)
                if starts is not None:
                    made[key][:, Field.BUFFER_BYTE] = torch.tensor(starts)
            tables.append(made[key])
        return tables

    def header(self, sender: int, step: int, status: Status = Status.KEPT) -> list[int]:
        """The four int64 words that open a payload."""
        return [VERSION << 32 | sender, step, self.payload_bytes, self._hash ^ status]

    def expected_headers(self, senders: Sequence[int], step: int) -> Tensor:
        """int64 [senders, 4]: what each payload must open with."""
        return torch.tensor([self.header(sender, step) for sender in senders])

    def compact(
        self, rank: int, dense: Tensor, pool: BufferPool, purpose: str, *, strict: bool = False
    ) -> Tensor:
        """What is coded of ``dense``, a 1-D slice that belongs to ``rank``: all of it."""
        return dense

    def kept(self, rank: int, place: int, values: Tensor) -> Tensor:
        """What is coded of one segment's ``values``, the 1-D shard of ``rank``: all of them."""
        return values

    def room(self, rank: int, dense: Tensor, pool: BufferPool) -> Tensor:
        """Where a payload of ``rank``'s slice is decoded, before `expand` fills ``dense``."""
        return dense

    def expand(self, rank: int, compact: Tensor, dense: Tensor) -> None:
        """Fill ``dense`` from what `compact` or `room` gave."""
        if compact is not dense:
            dense.copy_(compact)


class Masks(NamedTuple):
    """What all ranks keep of their shards of one parameter."""

    bits: Tensor
    """uint8 [ranks, bytes], see `bitmask`: of all parameters of the exchange."""
    start: int
    """The byte of a row where the parameter's own mask starts."""
    counts: list[int]
    """By rank, the values that are kept."""


class SparseGroupLayout(GroupLayout):
    """A layout whose payloads leave out what the masks prune: every rank's slice has its own sizes.

    Payloads are as long as the longest, so that one collective takes them.

    Args:
        segments: of the dense slice.
        group: of the random generator.
        numels, starts: as of `GroupLayout`.
        masks: by segment those of its parameter, of one exchange; None where all values travel.
    """

    is_sparse = True

    def __init__(
        self,
        segments: Sequence[Segment],
        group: int,
        numels: Sequence[Sequence[int]],
        starts: Sequence[int] | None,
        masks: Sequence[Masks | None],
    ) -> None:
        ranks = range(len(numels))
        self._kept = [
            [None if each is None else each.counts[rank] for each in masks] for rank in ranks
        ]
        layouts = [
            Layout(
                [
                    segment if count is None else replace(segment, padded=count)
                    for segment, count in zip(segments, kept, strict=True)
                ],
                group,
            )
            for kept in self._kept
        ]
        super().__init__(
            layouts,
            [
                [n if count is None else count for n, count in zip(whole, kept, strict=True)]
                for whole, kept in zip(numels, self._kept, strict=True)
            ],
        )
        self.num_values = sum(map(sum, numels))
        self._hash = hash_of([layout.hash for layout in layouts])
        self._segments, self._starts = segments, starts
        self._bitmaps = next(each.bits for each in masks if each is not None)
        self._bitmap_starts = [-1 if each is None else each.start for each in masks]
        self._spans: dict[tuple[int, torch.dtype], tuple[Tensor, int]] = {}

    def compact(
        self, rank: int, dense: Tensor, pool: BufferPool, purpose: str, *, strict: bool = False
    ) -> Tensor:
        """The kept values, valid until the next call with this purpose.

        ``strict``: raise RuntimeError where a pruned value is not zero.
        """
        spans, num_bytes = self._spans_of(rank, dense.dtype)
        out = pool.take(purpose, num_bytes, dense.device)
        given = dense.view(torch.uint8)
        ops.compact(given, spans, self._bitmaps[rank], out, strict)
        return out.view(dense.dtype)

    def kept(self, rank: int, place: int, values: Tensor) -> Tensor:
        start, num = self._bitmap_starts[place], values.numel()
        if start < 0:
            return values
        return values[bitmask.unpack(self._bitmaps[rank][start : start + -(-num // 8)], num)]

    def room(self, rank: int, dense: Tensor, pool: BufferPool) -> Tensor:
        num_bytes = self._spans_of(rank, dense.dtype)[1]
        return pool.take("room", num_bytes, dense.device).view(dense.dtype)

    def expand(self, rank: int, compact: Tensor, dense: Tensor) -> None:
        compact = compact.to(dense.dtype)
        spans = self._spans_of(rank, dense.dtype)[0]
        out = dense.view(torch.uint8)
        ops.expand(compact.view(torch.uint8), spans, self._bitmaps[rank], out)

    def _spans_of(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """The spans of ``rank``'s slice in a buffer of ``dtype`` (uint8: of the segments' own), and
        the bytes of its compact form."""
        key = (rank, dtype)
        if key not in self._spans:
            rows, dense_end, compact_end = [], 0, 0
            for i, segment in enumerate(self._segments):
                item = ITEM_BYTES[segment.dtype] if dtype == torch.uint8 else dtype.itemsize
                start = dense_end if self._starts is None else self._starts[i]
                kept = self._kept[rank][i]
                count = segment.padded if kept is None else kept
                rows.append(
                    [start, segment.padded, item, self._bitmap_starts[i], compact_end, count]
                )
                dense_end += segment.padded * item
                compact_end += count * item
            table = torch.tensor(rows, dtype=torch.int64).view(-1, len(Span))
            self._spans[key] = (table, compact_end)
        return self._spans[key]
