"""The quantized all-gather of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import HEADER_BYTES, Status
from qsdp.comm import transport
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.headers import check_headers
from qsdp.comm.topology import gathered_ranks
from qsdp.comm.traffic import Traffic
from qsdp.comm.transport import as_bytes
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import collective
from qsdp.common.gpu_streams import reads_on_this_stream, written_on_this_stream


class Payloads(NamedTuple):
    """What all ranks sent in one gather: the weights, to be decoded whenever they are needed."""

    layout: GroupLayout
    buffer: Tensor
    """uint8 [ranks * payload bytes], in the order of `gathered_ranks`."""
    step: int
    keys: tuple[int, ...]
    written: torch.Event | None = None
    """On a GPU: kept payloads may be decoded on another stream than they came on."""


class Gathering:
    """A gather of one layout that is under way.

    1. Encode this rank's shard. The input may be a view into the output: it is read first.
    2. One all-gather of payloads a stage, from the outermost to the innermost, of all that this
       rank has by then: [Note: Stages].
    3. Check every header: version, step, sender, size, plan.
    """

    def __init__(
        self,
        plan: Plan,
        layout: GroupLayout,
        input: Tensor,
        wire: Wire,
        buffer: Tensor,
        *,
        is_frozen: bool = False,
        async_op: bool = False,
    ) -> None:
        """Encode ``input``, this rank's flat shard, and start the first all-gather.

        ``buffer``: uint8 [ranks * payload bytes], for the payloads. ``is_frozen``: sent once for
        all steps. ``async_op``: beside what this thread does until `finish`.
        """
        clock = wire.clock
        key = clock.frozen_key if is_frozen else clock.gather_key
        keys = tuple(key(rank) for rank in range(plan.world_size))
        self._plan, self._wire = plan, wire
        self._payloads = Payloads(layout, buffer, 0 if is_frozen else clock.step, keys)
        size, group = layout.payload_bytes, plan.stages[-1].group
        self._gathered = self._room(group.size() * size)
        own = self._gathered.narrow(0, group.rank() * size, size)
        header = layout.header(plan.rank, self._payloads.step)
        table, own_key = layout.tables[plan.rank], keys[plan.rank]
        self._mistake: RuntimeError | None = None
        with wire.times.measure("gather", "encode", buffer.device):
            try:
                values = layout.compact(
                    plan.rank, as_bytes(input), wire.buffers, "compact", strict=True
                )
            except RuntimeError as error:  # the others wait for a payload of this size
                self._mistake = error
                header = layout.header(plan.rank, self._payloads.step, Status.FAILED)
                own[:HEADER_BYTES] = torch.tensor(header).view(torch.uint8)
            else:
                ops.encode(values, table, own_key, header, own, wire.level_values)
        with self._on_the_wire():
            self._arrival = transport.all_gather(self._gathered, own, group, async_op=async_op)

    def finish(self) -> Payloads:
        """Wait for the payloads. Raises RuntimeError when a header is not what is expected, or a
        pruned weight is not zero."""
        plan, wire, payloads = self._plan, self._wire, self._payloads
        size = payloads.layout.payload_bytes
        with self._on_the_wire():
            seen = self._arrival.wait()
            for stage in reversed(plan.stages[:-1]):
                handed_on = self._gathered
                self._gathered = self._room(stage.size * handed_on.numel())
                seen = transport.all_gather(self._gathered, handed_on, stage.group).wait()
                wire.buffers.release(handed_on)
        for stage in reversed(plan.stages):
            wire.traffic.gathered("gather", stage.group, size)
            size *= stage.size
        wire.traffic.in_fp32("gather", plan.world_size, payloads.layout.num_values)
        mistake, self._mistake = self._mistake, None
        if mistake is not None:
            try:
                raise mistake
            finally:  # an error that its own traceback holds would keep the process group
                del mistake
        senders = gathered_ranks(plan.stages)
        check_headers(seen, payloads.layout, senders, payloads.step, plan)
        return payloads._replace(written=written_on_this_stream(payloads.buffer.device))

    def _room(self, num_bytes: int) -> Tensor:
        """For the payloads of one stage: what the last one leaves is what is asked for."""
        buffer = self._payloads.buffer
        if num_bytes == buffer.numel():
            return buffer
        return self._wire.buffers.acquire(num_bytes, buffer.device)

    @contextmanager
    def _on_the_wire(self) -> Iterator[None]:
        plan, wire = self._plan, self._wire
        device = self._payloads.buffer.device
        with (
            collective("gather", plan.names, wire.clock.step),
            wire.times.measure("gather", "wire", device),
        ):
            yield


class GatheringWork(dist.Work):
    """What FSDP2 waits for before it uses a gather that it asked for ahead of time."""

    def __init__(self, finish: Any) -> None:
        super().__init__()
        self._finish = finish

    @property
    def is_finished(self) -> bool:
        return self._finish is None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Finish the gather, once."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        return True


def decode(plan: Plan, payloads: Payloads, output: Tensor, wire: Wire) -> None:
    """Decode every rank's payload into its slice of the flat ``output``, this rank's own too: all
    ranks compute with the same weights."""
    layout, size = payloads.layout, payloads.layout.payload_bytes
    received = dict(zip(gathered_ranks(plan.stages), payloads.buffer.split(size), strict=True))
    slices = as_bytes(output).chunk(plan.world_size)
    if payloads.written is not None:
        payloads.written.wait()
    reads_on_this_stream(payloads.buffer)
    with wire.times.measure("gather", "decode", output.device):
        for rank, (key, table) in enumerate(zip(payloads.keys, layout.tables, strict=True)):
            values = layout.room(rank, slices[rank], wire.buffers)
            ops.decode(received[rank], table, key, values, levels=wire.level_values)
            layout.expand(rank, values, slices[rank])


def regather(output: Tensor, input: Tensor, group: dist.ProcessGroup, traffic: Traffic) -> None:
    """All-gather weights that were decoded before, as they are: never quantize twice."""
    with collective("gather of decoded weights"):
        transport.all_gather(output, input, group).wait()
    num_bytes = input.numel() * input.element_size()
    num_values = input.numel() if input.is_floating_point() else num_bytes // 4
    traffic.gathered("gather", group, num_bytes)
    traffic.in_fp32("gather", group.size(), group.size() * num_values)
