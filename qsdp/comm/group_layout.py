"""One direction of one group: where each segment lies, by rank, and how slices become payloads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import (
    VERSION,
    Layout,
    PayloadStatus,
    Segment,
    payload_hash,
    payload_offsets,
)
from qsdp.codec.segment_table import Field, Part, SegmentRow
from qsdp.comm.buffers import BufferPool
from qsdp.comm.pruned_slices import PrunedSlices
from qsdp.comm.routes import Route, gather_route
from qsdp.common.dtypes import CODEC_DTYPES, ITEM_BYTES, DType
from qsdp.ops.reference.rotation import RotatedStretch


class GroupLayout:
    """The layout of one direction of a group, with the codec's tables of every rank.

    Args:
        segments: Those of a rank's slice of the flat buffer; all ranks' slices are of one size.
        group: The group's number for the random generator.
        numels: int64 [ranks, segments], the valid values.
        starts: The segments' places in the slice, in bytes: a layout may leave out some of the
            buffer's parameters.
        pruned: What payloads leave out; None for nothing. All are as long as the longest, so that
            one collective takes them.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        group: int,
        numels: Tensor,
        starts: Sequence[int] | None = None,
        pruned: PrunedSlices | None = None,
    ) -> None:
        self._layout = Layout(segments, group)
        self._hash = self._layout.hash
        self.pruned = pruned
        self._parts: dict[Route, Tensor] = {}
        self._stretches: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
        self._rotated = [i for i, each in enumerate(segments) if each.rotates_in]
        self.num_values = int(numels.sum())
        """Values of all ranks together, padding left out; pruned ones count."""
        padded = torch.tensor([segment.padded for segment in segments])
        if pruned is not None:
            numels, padded = numels.minimum(pruned.counts), pruned.counts
            self._hash = payload_hash([self._hash, *padded.flatten().tolist()])
        sizes = torch.cat([numels, padded.expand_as(numels)], dim=1)
        kinds, self._kinds = torch.unique(sizes, dim=0, return_inverse=True)
        self._numels, self._padded = kinds.split(len(segments), dim=1)
        meta, data, payload_bytes = payload_offsets(segments, [*self._padded.numpy().T])
        starts_of_both = np.empty((2, len(segments), len(kinds)), dtype=np.int64)
        for i, each in enumerate((meta, data)):
            for segment, at in enumerate(each):
                starts_of_both[i, segment] = at
        self._meta, self._data = torch.from_numpy(starts_of_both).mT
        epochs = [
            segment.epochs_start(self._meta[:, i], self._padded[:, i])
            for i, segment in enumerate(segments)
        ]
        self._epochs = torch.stack(epochs, dim=1) if epochs else self._meta
        self.payload_bytes = int(np.max(payload_bytes))
        """Bytes of every rank's payload."""
        self.tables = self._tables(None)
        """int64 [kinds, segments, len(Field)]: ranks whose slices are alike share a table."""
        if starts is not None and pruned is None:
            self.tables[:, :, Field.BUFFER_BYTE] = torch.tensor(starts)

    @cached_property
    def fp32_tables(self) -> Tensor:
        """The same tables for a flat buffer in fp32."""
        return self._tables(DType.FP32)

    def _tables(self, dtype: DType | None) -> Tensor:
        segments = self._layout.segments
        rows = torch.tensor(self._layout.table([0] * len(segments), dtype))
        items = [ITEM_BYTES[each.dtype if dtype is None else dtype] for each in segments]
        num_bytes = self._padded * torch.tensor(items)
        columns = {
            Field.BUFFER_BYTE: num_bytes.cumsum(1) - num_bytes,
            Field.NUMEL: self._numels,
            Field.PADDED: self._padded,
            Field.META_BYTE: self._meta,
            Field.DATA_BYTE: self._data,
            Field.EPOCH_BYTE: self._epochs,
        }
        tables = rows.repeat(len(self._padded), 1, 1)
        for field, values in columns.items():
            tables[:, :, field] = values
        return tables

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments of a payload, with the values that all ranks' slices reserve."""
        return self._layout.segments

    def segment_rows(self, rank: int) -> list[SegmentRow]:
        """The rows of the table of ``rank``'s slice, with names."""
        return [SegmentRow(row) for row in self.table(rank).tolist()]

    def table(self, rank: int) -> Tensor:
        """The table of ``rank``'s slice: int64 [segments, len(Field)]."""
        return self.tables[int(self._kinds[rank])]

    def parts(self, route: Route, keys: Tensor) -> Tensor:
        """What ``ops.encode_all`` or ``ops.decode_all`` works through: int64 [payloads, len(Part)].

        ``keys``: int64 [payloads].
        """
        known = self._parts.get(route)
        if known is None:
            columns = {
                Part.KEY: torch.zeros_like(route.owners),
                Part.TABLE: self._kinds[route.owners],
                Part.BUFFER: route.buffers,
                Part.PAYLOAD: route.payloads,
                Part.ADD: route.adds,
            }
            known = self._parts[route] = torch.stack([columns[each] for each in Part], dim=1)
        parts = known.clone()
        parts[:, Part.KEY] = keys
        return parts

    def header(
        self, sender: int, step: int, status: PayloadStatus = PayloadStatus.KEPT
    ) -> list[int]:
        """The four int64 words that open a payload."""
        return [VERSION << 32 | sender, step, self.payload_bytes, self._hash ^ status]

    def is_like(self, other: GroupLayout) -> bool:
        """Whether payloads of ``other`` are laid out as this one's, of the same kept values."""
        if self.segments != other.segments:
            return False
        if self.pruned is None or other.pruned is None:
            return self.pruned is other.pruned
        return self.pruned.has_masks_of(other.pruned)

    def expected_headers(self, senders: Sequence[int], step: int) -> Tensor:
        """int64 [senders, 4]: what each payload must open with."""
        headers = torch.tensor([self.header(0, step)]).repeat(len(senders), 1)
        headers[:, 0] |= torch.tensor(senders)
        return headers

    def encode(
        self,
        rank: int,
        dense: Tensor,
        key: int,
        header: list[int],
        payload: Tensor,
        pool: BufferPool,
        levels: Tensor | None,
    ) -> None:
        """Write the ``payload`` of ``rank``'s slice ``dense``, both uint8 [bytes].

        Raises RuntimeError where a pruned value is not zero.
        """
        values = self.coded(rank, dense, pool)
        ops.encode(values, self.table(rank), key, header, payload, levels)

    def coded(self, rank: int, dense: Tensor, pool: BufferPool) -> Tensor:
        """What is coded of ``rank``'s slice of weights ``dense``, both uint8 [bytes].

        Valid until the next call with this pool. Raises RuntimeError where a pruned value is not
        zero.
        """
        if self.pruned is None:
            return dense
        return self.pruned.compact(dense.view(1, -1), rank, pool, strict=True).view(-1)

    def decode(
        self,
        payloads: Tensor,
        order: tuple[int, ...],
        keys: Tensor,
        slices: Tensor,
        pool: BufferPool,
        levels: Tensor | None,
    ) -> None:
        """Fill the ``slices`` of all ranks where the layout's segments lie.

        Args:
            payloads: uint8 [ranks, payload bytes].
            order: The ranks that the payloads are of.
            keys: int64 [ranks], by rank.
            slices: uint8 [ranks, bytes], in the order of ranks.
            pool: Buffers for what is decoded.
            levels: The learned levels, if any.
        """
        parts = self.parts(gather_route(order), keys)
        pruned = self.pruned
        if pruned is None:
            ops.decode_all(payloads, self.tables, parts, slices, levels)
            return
        for first in range(0, len(parts), pruned.at_once):
            chosen = parts[first : first + pruned.at_once]
            num = len(chosen)
            tables = self.tables[chosen[:, Part.TABLE]]  # a call checks all that it is given
            chosen[:, Part.TABLE] = torch.arange(num)
            room = pool.take("room", num * pruned.width, slices.device).view(num, pruned.width)
            chosen[:, Part.BUFFER] -= first
            ops.decode_all(payloads, tables, chosen, room, levels)
            pruned.expand(room, first, slices[first : first + num])

    def compact(self, slices: Tensor, pool: BufferPool, first: int = 0) -> Tensor:
        """What is coded of ``slices``, [ranks, values] of the ranks from ``first`` on.

        Valid until the next call.
        """
        if self.pruned is None:
            return slices
        given = slices.view(torch.uint8)
        return self.pruned.compact(given, first, pool).view(slices.dtype)

    def expand(self, rank: int, compact: Tensor, dense: Tensor) -> None:
        """Fill ``rank``'s slice ``dense``, [values], from a row of ``compact``, or of sums."""
        if self.pruned is not None:
            values = compact.to(dense.dtype).view(torch.uint8).view(1, -1)
            self.pruned.expand(values, rank, dense.view(torch.uint8).view(1, -1))
        elif compact.data_ptr() != dense.data_ptr():
            dense.copy_(compact)

    def rotate(self, rows: Tensor, first: int = 0) -> None:
        """Rotate gradients in place, or back: [Note: Rotation] in ``ops/reference/rotation.py``.

        ``rows``: [ranks, values], contiguous, what is coded of the slices of ranks from ``first``
        on, in the layout's type or in fp32.
        """
        if not self._rotated:
            return
        place = (first, rows.shape, rows.dtype)
        stretches = self._stretches.get(place)
        if stretches is None:
            row_bytes = rows.shape[1] * rows.element_size()
            stretches = self._stretches[place] = self._stretches_of(*place, row_bytes)
        ops.rotate(rows.view(-1).view(torch.uint8), stretches)

    def _stretches_of(
        self, first: int, shape: torch.Size, dtype: torch.dtype, row_bytes: int
    ) -> Tensor:
        """int64 [ranks * rotated segments, len(RotatedStretch)]."""
        num = shape[0]
        tables = self.fp32_tables if dtype == torch.float32 else self.tables
        rows = tables[self._kinds[first : first + num]][:, self._rotated]
        buckets = torch.tensor([self.segments[i].rotates_in for i in self._rotated])
        columns = {
            RotatedStretch.BYTE: rows[..., Field.BUFFER_BYTE]
            + row_bytes * torch.arange(num)[:, None],
            RotatedStretch.NUMEL: rows[..., Field.NUMEL],
            RotatedStretch.BUCKET: buckets.expand(num, -1),
            RotatedStretch.DTYPE: torch.full(rows.shape[:2], CODEC_DTYPES[dtype]),
        }
        return torch.stack([columns[each] for each in RotatedStretch], dim=2).flatten(0, 1)

    def kept(self, rank: int, place: int, values: Tensor) -> Tensor:
        """What is coded of one segment's ``values``, the 1-D shard of ``rank``."""
        return values if self.pruned is None else self.pruned.kept(rank, place, values)
