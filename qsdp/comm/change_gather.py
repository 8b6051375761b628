"""The all-gather of what has changed of a group's weights: frames of [Note: Frame]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qsdp import ops
from qsdp.codec.change_frame import FRAME_HEADER_BYTES, bitmap_bytes
from qsdp.codec.payload import VERSION, PayloadStatus
from qsdp.comm.buffers import allocate_buffer
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.headers import check_none_failed
from qsdp.comm.routes import gather_route
from qsdp.comm.staged_gather import StagedGather
from qsdp.comm.topology import gathered_ranks
from qsdp.comm.wire_state import Wire


class Frames(NamedTuple):
    """What all ranks have sent of their changes in one gather."""

    bodies: Sequence[Tensor]
    """uint8 [body bytes] each, by rank: valid until ``release``."""
    longest: int
    """Bytes of the longest frame."""
    has_changes: bool
    """Whether any of them says more than that nothing has changed."""
    release: Callable[[], None]


class ChangeGather:
    """The all-gather of one group's changes that is under way.

    Args:
        plan: How the group travels.
        layout: That of the kept rows.
        shard: uint8 [bytes], this rank's flat shard: it is read here.
        row: uint8 [row bytes], what all ranks keep of it: it stays as it is.
        modes: int64 [segments], how each parameter is looked at.
        wire: What the group shares with the others.
        digest: That of all frames before.
        most: Bytes that no frame has more of.
        expected: Bytes that all ranks send at once of their frames.
        is_first: It is the first in a step: its bytes are those of training, in a validation too.
        async_op: The frames travel beside what this thread does until ``finish``.
    """

    def __init__(
        self,
        plan: Plan,
        layout: GroupLayout,
        shard: Tensor,
        row: Tensor,
        modes: Tensor,
        wire: Wire,
        *,
        digest: int,
        most: int,
        expected: int,
        is_first: bool,
        async_op: bool,
    ) -> None:
        self._plan, self._layout, self._wire = plan, layout, wire
        self._expected, self._most, self._device = expected, most, shard.device
        self.is_first = is_first
        self.step = step = wire.clock.step
        self._mistake: RuntimeError | None = None
        counts = [0, 0, 0]
        frame = wire.buffers.take("frame", most, shard.device)
        with wire.times.measure("gather", "encode", shard.device):
            status = PayloadStatus.KEPT
            try:
                values = layout.coded(plan.rank, shard, wire.buffers)
                to = frame[FRAME_HEADER_BYTES:]
                counts = changes_of(plan, layout, values, row, modes, wire, step, to)
            except RuntimeError as error:  # the others wait for a frame
                self._mistake, status = error, PayloadStatus.FAILED
            body, changed, drawn = counts
            length = FRAME_HEADER_BYTES + body
            word, _, _, plan_hash = layout.header(plan.rank, step, status)
            header = [word, step, length, plan_hash, _signed(digest), changed, drawn]
            frame[:FRAME_HEADER_BYTES] = torch.tensor(header).view(torch.uint8)
            self._gathered = wire.buffers.acquire(plan.world_size * expected, shard.device)
            self._gather = StagedGather(plan, self._gathered, wire, is_training=is_first)
            own, sent = self._gather.own, min(expected, length)
            own[:sent] = frame[:sent]
            own[sent:] = 0
            self._rest = frame[sent:length].clone()
        self._gather.start(async_op=async_op)

    def finish(self) -> Frames:
        """Wait for the frames.

        Raises RuntimeError where a header is not what is expected.
        """
        plan, wire = self._plan, self._wire
        seen = self._gather.wait()
        gathered = self._gathered.view(plan.world_size, self._expected)
        headers = (gathered if seen is None else seen.view_as(gathered))[:, :FRAME_HEADER_BYTES]
        places = gather_route(gathered_ranks(plan.stages)).payloads  # by rank
        headers = headers.contiguous().view(torch.int64).cpu()[places]
        wire.traffic.in_fp32("gather", plan.world_size, self._layout.num_values)
        mistake, self._mistake = self._mistake, None
        if mistake is not None:
            try:
                raise mistake
            finally:  # an error that its own traceback holds would keep the process group
                del mistake
        self._check(headers)
        changed, drawn = headers[:, 5:].sum(0).tolist()
        wire.traffic.changed(changed, drawn, is_training=self.is_first)
        lengths = headers[:, 2].tolist()
        whole = self._with_the_rest(gathered, max(lengths))
        bodies = [
            whole[place][FRAME_HEADER_BYTES:length]
            for place, length in zip(places.tolist(), lengths, strict=True)
        ]
        least = FRAME_HEADER_BYTES + bitmap_bytes(len(self._layout.segments))
        release = partial(wire.buffers.release, self._gathered)
        return Frames(bodies, max(lengths), max(lengths) > least, release)

    def _with_the_rest(self, gathered: Tensor, longest: int) -> Sequence[Tensor]:
        """The whole frames: gathers what did not fit, if anything."""
        plan = self._plan
        missing = longest - self._expected
        if missing <= 0:
            return [*gathered]
        rests = allocate_buffer(plan.world_size * missing, self._device)
        gather = StagedGather(plan, rests, self._wire, is_training=self.is_first)
        gather.own[: self._rest.numel()] = self._rest
        gather.own[self._rest.numel() :] = 0
        gather.start()
        gather.wait()
        return [*torch.cat([gathered, rests.view(-1, missing)], dim=1)]

    def _check(self, headers: Tensor) -> None:
        """Raise RuntimeError unless the headers are those of one run, whose frames fit."""
        plan = self._plan
        found = headers.tolist()
        _, _, _, plan_hash = self._layout.header(0, self.step)
        check_none_failed([each[3] ^ plan_hash for each in found], range(len(found)), plan)
        for rank, (word, step, length, its_hash, *_) in enumerate(found):
            expected = [VERSION << 32 | rank, self.step, plan_hash]
            fits = FRAME_HEADER_BYTES <= length <= self._most
            if [word, step, its_hash] != expected or not fits:
                raise RuntimeError(
                    f"rank {rank} sent changes with header {[word, step, its_hash]} and {length} "
                    f"bytes for the group of {plan.name}, but {expected} and at most {self._most} "
                    "are expected (version and sender, step, plan): run the same model, config "
                    "and step on every rank."
                )
        digests = [each[4] for each in found]
        if odd := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise RuntimeError(
                f"ranks 0 and {odd[0]} keep other codes of the group of {plan.name}, as one of "
                "them has missed what was sent: take the step again on every rank."
            )


def changes_of(
    plan: Plan,
    layout: GroupLayout,
    values: Tensor,
    row: Tensor,
    modes: Tensor,
    wire: Wire,
    step: int,
    body: Tensor,
) -> list[int]:
    """Write the changes of what is coded of this rank's shard, as a gather in ``step`` sends them.

    Returns the counts of ``encode_changes``, which also says what it is given.
    """
    key = int(wire.clock.kept_keys(plan.world_size)[plan.rank])
    how = wire.config.redraw_every, wire.config.room
    counts = torch.zeros(3, dtype=torch.int64)
    table = layout.table(plan.rank)
    ops.encode_changes(values, table, key, row, modes, step, *how, body, counts)
    found: list[int] = counts.tolist()
    return found


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)
