"""The objects that FSDP2 calls instead of its own collectives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.codec.payload import PayloadStatus
from qsdp.comm.all_gather import GatheringWork, WeightGather, regather
from qsdp.comm.all_reduce import all_reduce
from qsdp.comm.differing_gradients import GradientsDiffer
from qsdp.comm.gradient_consensus import Consensus, Places
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.kept_codes import KeptCodes
from qsdp.comm.late_reduce import LateReduce, exhaust
from qsdp.comm.reduce_scatter import Exchange, reduce, reduce_exchanges
from qsdp.comm.weight_cache import Source, WeightCache
from qsdp.comm.wire_state import Wire
from qsdp.common.checksum import checksum
from qsdp.common.gpu_streams import reads_on_this_stream
from qsdp.compat.autograd import is_in_backward
from qsdp.compat.gradient_views import (
    gradient_views_divider,
    gradients_are_views,
    views_may_fill_later,
)
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.compat.resharding import reshard_module
from qsdp.fsdp.deferred_average import DeferredAverage
from qsdp.fsdp.grad_recorder import GradRecorder
from qsdp.fsdp.passes import Passes


class _Comm:
    """What FSDP2 asks of both objects besides the collective itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer for FSDP2, uninitialised."""
        return torch.empty(*size, dtype=dtype, device=device)


class AllGatherHook(_Comm):
    """The object that FSDP2 calls for the all-gather of one group.

    The cache of payloads knows no FSDP2: what that and the module alone can say, it is told in
    values. Those are which parameters are trained, whether weights are needed again, and whether
    frozen ones were edited: the shards' contents are compared, since not every edit raises torch's
    counters of versions.

    Args:
        plan: How the group travels.
        wire, passes: What the group shares with the others.
        group: FSDP2's layout of it.
        recorder: Records the group's gradients.
        unwatched: What all groups share: the recorders that miss tensors of gathered groups.
    """

    def __init__(
        self,
        plan: Plan,
        wire: Wire,
        group: ParameterGroup,
        recorder: GradRecorder,
        unwatched: set[GradRecorder],
        passes: Passes,
    ) -> None:
        self._plan, self._wire, self._group = plan, wire, group
        self._recorder, self._unwatched, self.passes = recorder, unwatched, passes
        self.cache = WeightCache(plan, wire)
        self._kept = KeptCodes(plan, wire) if wire.config.gather == "delta" else None
        self._frozen_sum = 0
        self._gathered_at: tuple[str, int] | None = None

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather on the current stream.

        Returning None tells FSDP2 that there is no Work to wait for: its own event, recorded right
        after this call, orders what follows. With ``async_op`` on a CPU the wire runs beside the
        computation, and waiting for the Work decodes.
        """
        plan, wire = self._plan, self._wire
        if group.size() == self._group.regather_world_size and group is not plan.group:
            self.passes.before_collective_in_backward(plan)
            regather(output_tensor, input_tensor, group, wire.traffic)
            return None
        num_bytes = input_tensor.numel() * input_tensor.element_size()
        if group.size() != plan.world_size or num_bytes != plan.buffer_bytes:
            raise RuntimeError(
                f"FSDP2 gathers {num_bytes} bytes over {group.size()} ranks for the group of "
                f"{plan.name}, but its plan has {plan.buffer_bytes} over {plan.world_size}: "
                "install qsdp after the model has its final parameters, dtypes and sharding."
            )
        self._unwatched.add(self._recorder)
        self._unwatched -= {recorder for recorder in self._unwatched if recorder.watch()}
        in_backward = is_in_backward()
        if not in_backward:
            self.cache.forget_trained()
            self._recorder.forget_what_was_dropped()
            self.passes.before_gather(plan)
        self._gathered_at = self.passes.now
        if self._kept is not None and not wire.is_exact:
            return self._gather_changes(self._kept, input_tensor, output_tensor, async_op)
        weights = trained, frozen = self.cache.find(self._group.requires_grad())
        if in_backward and any(each.source is Source.WIRE for each in weights):
            self.passes.before_collective_in_backward(plan)
        if frozen.source is Source.WIRE:
            self._frozen_sum = self._sum_of_frozen()
        keeps = not wire.is_exact and not in_backward and self._is_needed_again()
        is_async = async_op and input_tensor.device.type == "cpu"
        given = input_tensor, output_tensor
        gather = WeightGather(
            plan, self.cache, wire, *weights, *given, keeps=keeps, async_op=is_async
        )

        def finish() -> None:
            with nullcontext() if in_backward else self.passes.meetings.mistakes_reach_replicas():
                gather.finish()

        if is_async and trained.source is Source.WIRE:
            return GatheringWork(finish)
        finish()
        return None

    def _gather_changes(
        self, kept: KeptCodes, input: Tensor, output: Tensor, async_op: bool
    ) -> dist.Work | None:
        """Send what has changed of the weights, and decode what all ranks keep of them.

        A backward pass decodes what its forward pass has seen.
        """
        if is_in_backward():
            if kept.is_of(self._wire.clock.step):
                kept.settle()
                kept.decode(output)
                return None
            self.passes.before_collective_in_backward(self._plan)
        is_async = async_op and input.device.type == "cpu"
        shards = self._group.local_shards()
        kept.begin(input, self._group.requires_grad(), shards, async_op=is_async)

        def finish() -> None:
            kept.settle()
            kept.decode(output)

        if is_async:
            return GatheringWork(finish)
        finish()
        return None

    @property
    def num_bytes(self) -> int:
        """Bytes that kept payloads and codes take on this rank."""
        return self.cache.num_bytes + (0 if self._kept is None else self._kept.num_bytes)

    def settle(self) -> None:
        """Apply what has arrived of the weights' changes, if any is under way."""
        if self._kept is not None:
            self._kept.settle()

    def forget_codes(self) -> None:
        """Draw all weights anew with the next gather, as all ranks do."""
        if self._kept is not None:
            self._kept.forget()

    @property
    def has_frozen(self) -> bool:
        """Whether payloads of frozen parameters are kept."""
        return self.cache.has_frozen

    def frozen_changed(self) -> bool:
        """Whether this rank's frozen shards are other ones than those that were sent."""
        return self._frozen_sum != self._sum_of_frozen()

    def forget_frozen(self) -> None:
        """Send the frozen parameters anew with the next gather."""
        self.cache.forget_frozen()

    def drop_stale(self, is_due: bool) -> None:
        """Free gathered weights that are not made of the weights, bits and levels of now."""
        group = self._group
        is_stale = self._gathered_at is not None and (
            is_due or self._gathered_at != self.passes.now
        )
        if is_stale and group.is_gathered and group.reshards_after_backward:
            reshard_module(group.module)

    def _sum_of_frozen(self) -> int:
        pairs = zip(self._group.local_shards(), self._group.requires_grad(), strict=True)
        return checksum(shard for shard, is_trained in pairs if not is_trained)

    def _is_needed_again(self) -> bool:
        # FSDP2 gathers with autograd off, and so does reentrant checkpointing compute: only the
        # module can tell a training forward from a validation.
        is_training = self._group.modules[0].training
        return self._wire.config.gather == "once" and is_training and self._group.gathers_again


class ReduceScatterHook(_Comm):
    """The object that FSDP2 calls for the reduce-scatter of one group.

    With ``replicas``, also for the all-reduce between these.
    """

    def __init__(
        self,
        plan: Plan,
        wire: Wire,
        group: ParameterGroup,
        recorder: GradRecorder,
        passes: Passes,
        replicas: dist.ProcessGroup | None,
    ) -> None:
        self._plan, self._wire, self._group = plan, wire, group
        self._recorder, self._passes, self._replicas = recorder, passes, replicas
        # Replicas are not there while their average is put off.
        self._consensus = {True: Consensus(plan, replicas), False: Consensus(plan, None)}
        self._reduced: tuple[Places, int] | None = None
        self._deferred = DeferredAverage(plan, group)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Reduce on the current stream, complete in stream order on return.

        On CPUs, where FSDP2 only takes views of the output, it is left under way: [Note: Late].
        """
        plan, wire = self._plan, self._wire
        if is_in_backward():
            self._passes.before_collective_in_backward(plan)
        else:
            self._passes.settle_what_was_cut_short()
        slot = wire.late.make_room(plan.index, adds=self._group.has_gradients)
        if op != dist.ReduceOp.SUM:
            raise RuntimeError(
                f"FSDP2 asks the group of {plan.name} for {op}, but qsdp sums: leave "
                "set_force_sum_reduction_for_comms on."
            )
        with_grad = self._recorder.take(input_tensor.numel() // plan.world_size)

        def exchanges(places: Places) -> list[Exchange]:
            return reduce_exchanges(plan, places, input_tensor.dtype, group, wire)

        def averaged(places: Places) -> GroupLayout:
            return plan.reduce(places, output_tensor.dtype, wire.least_bits)

        step, device = wire.clock.step, input_tensor.device
        consensus = self._consensus[self._group.all_reduces]
        refuse = partial(consensus.refuse, with_grad, group, device)
        may_others_be_late = (
            self._replicas is None
            and gradients_are_views(self._group, output_tensor)
            and self._passes.meetings.may_be_late(plan)
        )
        is_late = may_others_be_late and views_may_fill_later(self._group, with_grad)
        if may_others_be_late:
            self._passes.backward.end_late()
        try:
            consensus.settle(with_grad, group, exchanges, step, device, averaged)
            own = exchanges(with_grad)
            reducing = reduce(plan, own, output_tensor, input_tensor, wire, slot, is_late=is_late)
            if not is_late:
                try:
                    self._reduced = (with_grad, exhaust(reducing))
                except GradientsDiffer:
                    consensus.tell_replicas(averaged(with_grad), step, device, PayloadStatus.MIXED)
                    raise
                return
        except GradientsDiffer:
            if not may_others_be_late:
                refuse()
            wire.late.refuse_at_the_end(LateReduce(plan.index, output_tensor, refuse))
        else:
            divide = gradient_views_divider(self._group, output_tensor)
            late = LateReduce(plan.index, output_tensor, refuse, reducing, slot, divide)
            wire.late.leave(late, len(own))

    def all_reduce(self, reduce_output: Tensor) -> None:
        """FSDP2's all-reduce hook: average what was just reduced over the replicas, in place.

        While ``set_requires_all_reduce`` puts that off, it becomes zero and its sum waits, as with
        FSDP2's own replicas.
        """
        assert self._reduced is not None
        assert self._replicas is not None
        with_grad, occurrence = self._reduced
        plan, wire, group = self._plan, self._wire, self._group
        # FSDP2 reduced it on another stream, and drops it where gradients have another type.
        reads_on_this_stream(reduce_output)
        tell = partial(self._tell_replicas, with_grad, reduce_output)
        self._deferred.add_to(reduce_output, with_grad, tell)
        if not group.all_reduces:
            self._deferred.defer(reduce_output, with_grad)
            return
        divisor = 1 if group.has_divisor else self._replicas.size()
        try:
            all_reduce(plan, with_grad, reduce_output, self._replicas, occurrence, wire, divisor)
        except GradientsDiffer:
            self._consensus[True].refuse(with_grad, plan.group, reduce_output.device)

    def _tell_replicas(self, places: Places, reduced: Tensor) -> None:
        """Tell the replicas, which wait for the average of ``reduced``, that it will not come."""
        layout = self._plan.reduce(places, reduced.dtype, self._wire.least_bits)
        step, device = self._wire.clock.step, reduced.device
        with suppress(RuntimeError):
            self._consensus[True].tell_replicas(layout, step, device, PayloadStatus.FAILED)
