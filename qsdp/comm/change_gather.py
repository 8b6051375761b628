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
from qsdp.comm.headers import Misheard, check_none_failed
from qsdp.comm.routes import gather_route
from qsdp.comm.shared_rows import News, SharedRows, signed
from qsdp.comm.staged_gather import StagedGather
from qsdp.comm.wire_state import Wire


class Frames(NamedTuple):
    """What ranks have sent of their changes in one gather."""

    bodies: Sequence[Tensor]
    """uint8 [body bytes] each, in the order of the rows: valid until ``release``."""
    news: News
    """What they say; the digest is that of all frames before."""
    release: Callable[[], None]


class ChangeGather:
    """The all-gather of one group's changes that is under way.

    Args:
        plan: How the group travels.
        shared: Where its rows are.
        layout: That of the rows.
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
        shared: SharedRows,
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
        self._plan, self._shared, self._layout, self._wire = plan, shared, layout, wire
        self._expected, self._most, self.device = expected, most, shard.device
        self._digest, self.is_first = digest, is_first
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
            header = [word, step, length, plan_hash, signed(digest), changed, drawn]
            frame[:FRAME_HEADER_BYTES] = torch.tensor(header).view(torch.uint8)
            self._gathered = wire.buffers.acquire(len(shared.owners) * expected, shard.device)
            self._gather = self._over_stages(self._gathered)
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
        gathered = self._gathered.view(-1, self._expected)
        headers = (gathered if seen is None else seen.view_as(gathered))[:, :FRAME_HEADER_BYTES]
        places = gather_route(self._shared.order).payloads  # by row
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
        lengths = headers[:, 2].tolist()
        whole = self._with_the_rest(gathered, max(lengths))
        bodies = [
            whole[place][FRAME_HEADER_BYTES:length]
            for place, length in zip(places.tolist(), lengths, strict=True)
        ]
        least = FRAME_HEADER_BYTES + bitmap_bytes(len(self._layout.segments))
        longest = max(lengths)
        news = News(self._digest, longest, longest > least, changed, drawn)
        return Frames(bodies, news, partial(wire.buffers.release, self._gathered))

    def _over_stages(self, whole: Tensor) -> StagedGather:
        """The all-gather of parts of frames into ``whole``."""
        stages = self._shared.stages
        return StagedGather(self._plan, stages, whole, self._wire, is_training=self.is_first)

    def _with_the_rest(self, gathered: Tensor, longest: int) -> Sequence[Tensor]:
        """The whole frames: gathers what did not fit, if anything."""
        missing = longest - self._expected
        if missing <= 0:
            return [*gathered]
        rests = allocate_buffer(len(gathered) * missing, self.device)
        gather = self._over_stages(rests)
        gather.own[: self._rest.numel()] = self._rest
        gather.own[self._rest.numel() :] = 0
        gather.start()
        gather.wait()
        return [*torch.cat([gathered, rests.view(-1, missing)], dim=1)]

    def _check(self, headers: Tensor) -> None:
        """Raise Misheard unless the headers are those of one run, whose frames fit."""
        plan, senders, found = self._plan, self._shared.owners, headers.tolist()
        _, _, _, plan_hash = self._layout.header(0, self.step)
        check_none_failed([each[3] ^ plan_hash for each in found], senders, plan)
        for rank, (word, step, length, its_hash, *_) in zip(senders, found, strict=True):
            expected = [VERSION << 32 | rank, self.step, plan_hash]
            fits = FRAME_HEADER_BYTES <= length <= self._most
            if [word, step, its_hash] != expected or not fits:
                raise Misheard(
                    f"rank {rank} sent changes with header {[word, step, its_hash]} and {length} "
                    f"bytes for the group of {plan.name}, but {expected} and at most {self._most} "
                    "are expected (version and sender, step, plan): run the same model, config "
                    "and step on every rank."
                )
        digests = [each[4] for each in found]
        same = [digest == digests[0] for digest in digests]
        if not all(same):
            raise Misheard(
                f"ranks {senders[0]} and {senders[same.index(False)]} keep other codes of the "
                f"group of {plan.name}, as one of them has missed what was sent: take the step "
                "again on every rank."
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
