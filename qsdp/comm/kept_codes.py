"""The codes that every rank keeps of a group's weights, and the frames that bring them up to date.

[Note: Kept] Of each rank of the shard group all ranks keep a row, or the ranks of a node between
them (``shared_rows.py``): its codes, with the grids that they are on. A gather sends what has
changed of them, and decodes the rows. A frame is applied exactly once on every rank that keeps the
row, before the group's next frame: a rank that missed one would decode other weights for ever. So a
digest of all frames so far is in every header, and in what ranks compare where a pass begins. Where
digests differ all ranks forget what they keep, and the next frame draws all grids anew. So it does
where other bits or masks give the rows another layout.

Codes have no history, grids have one. So grids are what a checkpoint must have: where they are
restored, the next frame says all codes, on these, and all goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from qsdp import ops
from qsdp.codec.change_frame import (
    FRAME_HEADER_BYTES,
    FrameSizes,
    bitmap_bytes,
    most_body_bytes,
)
from qsdp.comm.buffers import allocate_buffer, as_bytes
from qsdp.comm.change_gather import ChangeGather, changes_of
from qsdp.comm.grid_exchange import exchange_grids, fill_grids, grids_of_row, kept_buckets
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.headers import Misheard
from qsdp.comm.quantization_error import Meter
from qsdp.comm.shared_rows import News, SharedRows, ToldMistake, added
from qsdp.comm.wire_state import Wire
from qsdp.common.checksum import checksum
from qsdp.common.gpu_streams import reads_on_this_stream, written_on_this_stream
from qsdp.common.user_errors import quoted
from qsdp.ops.reference.changes import FROZEN, STILL, TRAINED
from qsdp.ops.reference.kept_grids import KeptGrids


class KeptCodes:
    """The kept codes of one group: [Note: Kept].

    Args:
        plan: How the group travels.
        wire: What the group shares with the others.
    """

    def __init__(self, plan: Plan, wire: Wire) -> None:
        self._plan, self._wire = plan, wire
        wire.kept[plan.index] = self
        self._shared = SharedRows(plan, wire)
        self._rows: Tensor | None = None
        self._used: torch.Event | None = None
        self._arriving: ChangeGather | None = None
        self.forget()

    def forget(self) -> None:
        """Let the next frame draw all grids anew; all ranks forget together."""
        plan, self._arriving = self._plan, None
        self._layout = layout = plan.kept_rows()
        rows = [layout.segment_rows(rank) for rank in range(plan.world_size)]
        most = FRAME_HEADER_BYTES + max(map(most_body_bytes, rows))
        raw = max(sum(each.data_bytes for each in row if not each.bits) for row in rows)
        least = FRAME_HEADER_BYTES + bitmap_bytes(len(layout.segments))
        # Few bytes a bucket change in a step; what is left comes behind.
        self._first, self._more = (
            FrameSizes(least + raw + most // 16, most),
            FrameSizes(least, most),
        )
        self._is_new, self._has_rows, self._step, self._most = True, False, -1, most
        self._begun = -1
        self._frozen_sums: dict[int, int] = {}
        self._sent_sums: dict[int, int] = {}
        self._sizes: FrameSizes | None = None
        self._digest, self._is_applying, self._has_moved = 0, False, False

    @property
    def state(self) -> tuple[object, ...]:
        """What is the same on all ranks as long as none has missed a frame."""
        sizes = (self._first.expected, self._more.expected)
        return self._digest, self._step, self._is_new, self._has_moved, *sizes

    @property
    def begun(self) -> int:
        """The step in which all grids were drawn the last time; -1 before.

        All replicas have the same, unless ranks of one had to forget.
        """
        return self._begun

    @property
    def is_cut_short(self) -> bool:
        """Whether this rank was interrupted while it applied frames: its rows may be anything."""
        return self._is_applying

    @property
    def is_by_node(self) -> bool:
        """Whether to decode them is a collective of the node's ranks."""
        return self._shared.is_by_node

    @property
    def num_bytes(self) -> int:
        """Bytes that the kept rows take on this rank."""
        return 0 if self._rows is None else self._rows.numel()

    def is_of(self, step: int) -> bool:
        """Whether the codes are those of the forward passes in ``step`` of the clock.

        Not behind a further frame in the step that has changed some: others' weights may have been
        evaluated in between, and what this rank's are now has to be sent.
        """
        self.settle()
        return self._step == step and not self._has_moved

    def begin(
        self, input: Tensor, trains: Sequence[bool], shards: Sequence[Tensor], *, async_op: bool
    ) -> None:
        """Send what has changed of this rank's flat shard ``input``: ``settle`` ends it.

        Args:
            input: It is read here.
            trains: By place, which parameters are trained.
            shards: By place, this rank's shards: frozen ones are looked at where they were edited.
            async_op: The frames travel beside what this thread does until ``settle``.
        """
        self.settle()
        if (layout := self._plan.kept_rows()) is not self._layout:
            if layout.is_like(self._layout):
                self._layout = layout  # to be known by itself from now on
            else:
                self.forget()
        rows, step = self._rows_of(input.device), self._wire.clock.step
        if self._is_new:
            self._begun = step
        is_first = step != self._step
        sizes = self._first if is_first else self._more
        sums = {
            place: checksum([shards[place]]) for place, trained in enumerate(trains) if not trained
        }
        modes = [
            TRAINED if trained else STILL if sums[i] == self._frozen_sums.get(i) else FROZEN
            for i, trained in enumerate(trains)
        ]
        expected = self._most if self._is_new else sizes.expected
        # Before the frame: a rank that was interrupted here has another step than the others.
        self._step, self._sent_sums = step, sums
        self._sizes = None if self._is_new else sizes
        self._arriving = ChangeGather(
            self._plan,
            self._shared,
            self._layout,
            as_bytes(input),
            rows[self._shared.own],
            torch.tensor(modes, dtype=torch.int64),
            self._wire,
            digest=self._digest,
            most=self._most,
            expected=expected,
            is_first=is_first,
            async_op=async_op,
        )

    def settle(self) -> None:
        """Apply the frames that are under way, if any: once, by whoever comes first.

        Raises RuntimeError, on every rank, where the frames are not those of one run.
        """
        arriving, self._arriving = self._arriving, None
        if arriving is None:
            return
        try:
            news = self._shared.tell(partial(self._take, arriving), arriving.device)
        except ToldMistake:
            self.forget()
            raise
        if self._sizes is not None:
            self._sizes.saw(news.longest)
        self._wire.traffic.changed(news.changed, news.drawn, is_training=arriving.is_first)
        self._is_new, self._frozen_sums = False, self._sent_sums
        self._has_moved = not arriving.is_first and (self._has_moved or news.has_changes)
        self._digest, self._is_applying = news.digest, False

    def _take(self, arriving: ChangeGather) -> News:
        """Bring this rank's rows up to date with the frames that come to it."""
        try:
            frames = arriving.finish()
        except RuntimeError:
            self.forget()
            raise
        # Whoever is interrupted from here on may have applied a part, others all of it or nothing.
        self._is_applying = True
        assert self._rows is not None
        plan, wire, digest = self._plan, self._wire, frames.news.digest
        self._wait_for_others()
        with wire.times.measure("gather", "decode", self._rows.device):
            for rank, body, row in zip(self._shared.owners, frames.bodies, self._rows, strict=True):
                try:
                    ops.apply_changes(body, self._layout.table(rank), arriving.step, row)
                except ValueError as error:
                    self.forget()
                    raise Misheard(
                        f"rank {rank} sent changes for the group of {plan.name} that cannot be "
                        f"({quoted(error)}): run the same version of qsdp on every rank."
                    ) from None
                digest = added(digest, checksum([body]))
        self._used = written_on_this_stream(self._rows.device)
        frames.release()
        return frames.news._replace(digest=digest)

    def decode(self, output: Tensor) -> None:
        """Fill the flat buffer ``output`` of all ranks with what the kept codes stand for."""
        assert self._rows is not None
        plan, layout, wire = self._plan, self._layout, self._wire
        keys = wire.clock.kept_keys(plan.world_size)
        slices = as_bytes(output).view(plan.world_size, plan.buffer_bytes)
        self._wait_for_others()
        with (
            self._shared.all_rows(self._rows) as (rows, order),
            wire.times.measure("gather", "decode", output.device),
        ):
            layout.decode(rows, order, keys, slices, wire.buffers, None)
        self._used = written_on_this_stream(output.device)

    def measure(self, meter: Meter, shards: Sequence[Tensor], trains: Sequence[bool]) -> None:
        """Let ``meter`` compare this rank's ``shards``, by place, with what all would decode now.

        Nothing is sent, and what is kept stays as it is.
        """
        self.settle()
        plan, layout, wire = self._plan, self._plan.kept_rows(), self._wire
        step, device = wire.clock.next_step, shards[0].device
        row = torch.empty(layout.payload_bytes, dtype=torch.uint8, device=device)
        if layout.is_like(self._layout):
            row.copy_(self._rows_of(device)[self._shared.own])
        else:
            clear(row, layout, plan.rank)
        exact, decoded = (
            torch.zeros(plan.buffer_bytes, dtype=torch.uint8, device=device) for _ in range(2)
        )
        segments = layout.segment_rows(plan.rank)
        for place, (segment, shard, p) in enumerate(
            zip(segments, shards, plan.parameters, strict=True)
        ):
            values = shard.detach().to(p.dtype).reshape(-1)
            if segment.bits:
                sent = layout.kept(plan.rank, place, values)
                segment.store(exact, sent, keep_padding=True)
        modes = torch.tensor([TRAINED if trained else FROZEN for trained in trains])
        body = wire.buffers.take("frame", most_body_bytes(segments), device)
        num_bytes, *_ = changes_of(plan, layout, exact, row, modes, wire, step, body)
        table, key = layout.table(plan.rank), int(wire.clock.kept_keys(plan.world_size)[plan.rank])
        ops.apply_changes(body[:num_bytes], table, step, row)
        ops.decode(row, table, key, decoded)
        for segment, p in zip(segments, plan.parameters, strict=True):
            if segment.bits:
                meter.add_decoded(p.index, segment.values(exact), segment.values(decoded))

    def own_grids(self, device: torch.device) -> dict[int, KeptGrids]:
        """By place, copies of this rank's kept grids: fp32, fp32 and int32 [``kept_buckets``] each.

        A minimum is NaN where nothing was sent, or where the next frame draws all anew.
        """
        self.settle()
        self._wait_for_others()
        rank, layout = self._plan.rank, self._plan.kept_rows()
        is_kept = self._has_rows and layout.is_like(self._layout)
        row = self._rows[self._shared.own] if is_kept and self._rows is not None else None
        found = grids_of_row(row, layout.segment_rows(rank), kept_buckets(self._plan), device)
        self._used = written_on_this_stream(device)
        return found

    def restore(self, own: Mapping[int, KeptGrids]) -> None:
        """Let the next frame send all codes on grids that ``own_grids`` gave: a collective.

        ``own`` is this rank's by place, of all ``kept_buckets``.
        """
        self.forget()
        if not own:
            return
        everyone, buckets = exchange_grids(self._plan, self._wire, own), kept_buckets(self._plan)
        for rank, row in zip(self._shared.owners, self._rows_of(everyone.device), strict=True):
            fill_grids(row, self._layout.segment_rows(rank), buckets, everyone[rank])
        self._used = written_on_this_stream(everyone.device)
        self._digest = checksum([everyone])

    def _wait_for_others(self) -> None:
        """Let a GPU's current stream use the rows after the last one that did."""
        if self._used is not None and self._rows is not None:
            self._used.wait()
            reads_on_this_stream(self._rows)

    def _rows_of(self, device: torch.device) -> Tensor:
        """uint8 [owners, row bytes]."""
        self._wait_for_others()
        shape = len(self._shared.owners), self._layout.payload_bytes
        if self._rows is None or self._rows.shape != shape or self._rows.device != device:
            self._rows = allocate_buffer(prod(shape), device).view(shape)
        if not self._has_rows:
            for rank, row in zip(self._shared.owners, self._rows, strict=True):
                clear(row, self._layout, rank)
            self._has_rows = True
        return self._rows


def clear(row: Tensor, layout: GroupLayout, rank: int) -> None:
    """Make ``row`` that of a rank which has sent nothing: zero, with NaN for every minimum."""
    row.zero_()
    for segment in layout.segment_rows(rank):
        if segment.bits:
            segment.meta(row).view(torch.float32)[::2] = torch.nan
