"""The quantized all-gather of weights."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.codec.payload import HEADER_BYTES, PayloadStatus
from qsdp.comm import transport
from qsdp.comm.buffers import allocate_buffer, as_bytes
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.headers import check_headers
from qsdp.comm.staged_gather import StagedGather
from qsdp.comm.topology import gathered_ranks
from qsdp.comm.traffic import Traffic
from qsdp.comm.weight_cache import CacheablePayloads, FoundWeights, Source, WeightCache
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import collective
from qsdp.common.gpu_streams import reads_on_this_stream, written_on_this_stream


class WeightGather:
    """The all-gather of one group's weights that is under way.

    Trained and frozen weights have a layout each. What the cache has is decoded, the rest crosses
    the wire first.

    Args:
        plan: How the group travels.
        cache: The payloads that the group keeps.
        wire: What the group shares with the others.
        trained, frozen: What ``WeightCache.find`` says of this gather.
        input: This rank's flat shard, maybe a view into ``output``: it is read here.
        output: The flat buffer of all ranks, filled by ``finish``.
        keeps: Whether the backward pass decodes the trained payloads again.
        async_op: The trained ones travel beside what this thread does until ``finish``.
    """

    def __init__(
        self,
        plan: Plan,
        cache: WeightCache,
        wire: Wire,
        trained: FoundWeights,
        frozen: FoundWeights,
        input: Tensor,
        output: Tensor,
        *,
        keeps: bool,
        async_op: bool = False,
    ) -> None:
        self._plan, self._cache, self._wire = plan, cache, wire
        self._output, self._keeps, self._places = output, keeps, trained.places
        self._kept = [each.payloads for each in (frozen, trained) if each.payloads is not None]
        self._sent: list[tuple[PayloadGather, bool]] = []
        if frozen.source is Source.WIRE:  # once for all steps, so also for a warm-up's
            layout = plan.gather(frozen.places, is_frozen=True)
            buffer = allocate_buffer(plan.world_size * layout.payload_bytes, input.device)
            sent = PayloadGather(plan, layout, input, wire, buffer, is_frozen=True)
            self._sent.append((sent, True))
        if trained.source is Source.WIRE:
            least_bits = 32 if wire.is_exact else wire.least_bits
            layout = plan.gather(trained.places, least_bits, is_dense=wire.is_exact)
            room = cache.room if keeps else wire.buffers.acquire
            buffer = room(plan.world_size * layout.payload_bytes, input.device)
            sent = PayloadGather(plan, layout, input, wire, buffer, async_op=async_op)
            self._sent.append((sent, False))

    def finish(self) -> None:
        """Wait for the payloads and fill the output.

        Raises RuntimeError when a header is not what is expected, or a pruned weight is not zero.
        """
        for payloads in self._kept:
            decode_gathered(self._plan, payloads, self._output, self._wire)
        for gathering, is_frozen in self._sent:
            payloads = gathering.finish()
            decode_gathered(self._plan, payloads, self._output, self._wire)
            if is_frozen:
                self._cache.keep_frozen(payloads)
            elif self._keeps:
                self._cache.keep_trained(self._places, payloads)
            else:
                self._wire.buffers.release(payloads.buffer)


class PayloadGather:
    """The all-gather of one layout's payloads that is under way.

    1. Encode this rank's shard. The input may be a view into the output: it is read first.
    2. All-gather the payloads over all stages: [Note: Stages].
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

        Args:
            buffer: uint8 [ranks * payload bytes], for the payloads.
            is_frozen: The weights are sent once for all steps.
            async_op: The payloads travel beside what this thread does until ``finish``.
        """
        clock = wire.clock
        keys = (clock.frozen_keys if is_frozen else clock.gather_keys)(plan.world_size)
        step = 0 if is_frozen else clock.step
        self._plan, self._wire = plan, wire
        self._payloads = CacheablePayloads(layout, buffer, step, keys)
        self._gather = StagedGather(plan, plan.stages, buffer, wire)
        own = self._gather.own
        header = layout.header(plan.rank, step)
        self._mistake: RuntimeError | None = None
        with wire.times.measure("gather", "encode", buffer.device):
            try:
                shard, key = as_bytes(input), int(keys[plan.rank])
                pool, levels = wire.buffers, wire.level_values
                layout.encode(plan.rank, shard, key, header, own, pool, levels)
            except RuntimeError as error:  # the others wait for a payload of this size
                self._mistake = error
                header = layout.header(plan.rank, step, PayloadStatus.FAILED)
                own[:HEADER_BYTES] = torch.tensor(header).view(torch.uint8)
        self._gather.start(async_op=async_op)

    def finish(self) -> CacheablePayloads:
        """Wait for the payloads.

        Raises RuntimeError when a header is not what is expected, or a pruned weight is not zero.
        """
        plan, wire, payloads = self._plan, self._wire, self._payloads
        seen = self._gather.wait()
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


class GatheringWork(dist.Work):
    """What FSDP2 waits for before it uses an all-gather that it asked for ahead of time."""

    def __init__(self, finish: Any) -> None:
        super().__init__()
        self._finish = finish

    @property
    def is_finished(self) -> bool:
        """Whether the gather was waited for."""
        return self._finish is None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Finish the gather, once."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        return True


def decode_gathered(plan: Plan, payloads: CacheablePayloads, output: Tensor, wire: Wire) -> None:
    """Decode what an all-gather brought: each rank's payload into its slice of ``output``.

    This rank's own is decoded too: all ranks compute with the same weights.
    """
    layout = payloads.layout
    if payloads.written is not None:
        payloads.written.wait()
    reads_on_this_stream(payloads.buffer)
    slices = as_bytes(output).view(plan.world_size, plan.buffer_bytes)
    received = payloads.buffer.view(plan.world_size, layout.payload_bytes)
    with wire.times.measure("gather", "decode", output.device):
        order, pool, levels = gathered_ranks(plan.stages), wire.buffers, wire.level_values
        layout.decode(received, order, payloads.keys, slices, pool, levels)


def regather(output: Tensor, input: Tensor, group: dist.ProcessGroup, traffic: Traffic) -> None:
    """All-gather weights that were decoded before, as they are: never quantize twice."""
    with collective("gather of decoded weights"):
        transport.start_all_gather(output, input, group).wait()
    num_bytes = input.numel() * input.element_size()
    num_values = input.numel() if input.is_floating_point() else num_bytes // 4
    traffic.gathered("gather", group, num_bytes)
    traffic.in_fp32("gather", group.size(), group.size() * num_values)
