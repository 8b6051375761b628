"""The object that FSDP2 calls for the reduce-scatter of one group."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qsdp.codec.payload import PayloadStatus
from qsdp.comm.all_reduce import all_reduce
from qsdp.comm.differing_gradients import GradientsDiffer
from qsdp.comm.gradient_consensus import Consensus, Places
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.late_reduce import LateReduce, exhaust
from qsdp.comm.reduce_scatter import Exchange, reduce, reduce_exchanges
from qsdp.comm.wire_state import Wire
from qsdp.common.gpu_streams import reads_on_this_stream
from qsdp.compat.autograd import is_in_backward
from qsdp.compat.comm_buffers import CommBuffers
from qsdp.compat.gradient_views import (
    gradient_views_divider,
    gradients_are_views,
    views_may_fill_later,
)
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.fsdp.deferred_average import DeferredAverage
from qsdp.fsdp.grad_recorder import GradRecorder
from qsdp.fsdp.passes import Passes


class ReduceScatterHook(CommBuffers):
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
