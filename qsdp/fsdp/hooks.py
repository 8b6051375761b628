"""The objects that FSDP2 calls instead of its own collectives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from qsdp import compat
from qsdp.codec.payload import Status
from qsdp.comm.all_gather import Gathering, GatheringWork, Payloads, decode, regather
from qsdp.comm.all_reduce import all_reduce
from qsdp.comm.consensus import Consensus, Places
from qsdp.comm.group_plan import Plan
from qsdp.comm.late_reduce import LateReduce, SetsDiffer, exhaust
from qsdp.comm.layout import GroupLayout
from qsdp.comm.reduce_scatter import Hop, hops_of, reduce
from qsdp.comm.scratch import allocate, reads_on_this_stream
from qsdp.comm.wire_state import Wire
from qsdp.common.checksum import checksum
from qsdp.common.failures import listed
from qsdp.fsdp.passes import Passes


class _Comm:
    """What FSDP2 asks of both objects besides the collective itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Comm):
    """The all-gather of one group.

    With `gather="once"` it keeps payloads: those of a training forward until the backward pass
    decodes them again, those of frozen parameters until one of these is edited or trained: the
    shards' contents are compared, since not every edit raises torch's counters of versions.

    Args:
        plan: how the group travels.
        wire, passes: what it shares with the others.
        group: FSDP2's layout of it.
        recorder: of its gradients.
        unwatched: what all groups share: the recorders that miss tensors of gathered groups.
    """

    def __init__(
        self,
        plan: Plan,
        wire: Wire,
        group: compat.ParameterGroup,
        recorder: GradRecorder,
        unwatched: set[GradRecorder],
        passes: Passes,
    ) -> None:
        self._plan, self._wire, self._group = plan, wire, group
        self._recorder, self._unwatched, self.passes = recorder, unwatched, passes
        self._kept: Payloads | None = None
        self._buffer: Tensor | None = None
        self._frozen: Payloads | None = None
        self._frozen_sum = 0
        self._gathered_at: tuple[str, int] | None = None

    @property
    def kept_bytes(self) -> int:
        """What the buffers of kept payloads take on this rank."""
        frozen = None if self._frozen is None else self._frozen.buffer
        return sum(buffer.numel() for buffer in (self._buffer, frozen) if buffer is not None)

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
        given = input_tensor.numel() * input_tensor.element_size()
        if group.size() != plan.world_size or given != plan.buffer_bytes:
            raise RuntimeError(
                f"FSDP2 gathers {given} bytes over {group.size()} ranks for the group of "
                f"{plan.name}, but its plan has {plan.buffer_bytes} over {plan.world_size}: "
                "install qsdp after the model has its final parameters, dtypes and sharding"
            )
        self._unwatched.add(self._recorder)
        self._unwatched -= {recorder for recorder in self._unwatched if recorder.watch()}
        in_backward = compat.in_backward()
        kept = self._kept if in_backward and not wire.is_exact else None
        self._kept = None
        if not in_backward:
            self._recorder.forget_what_was_dropped()
            self.passes.before_gather(plan)
        self._gathered_at = self.passes.now
        places = plan.places if wire.is_exact else self._gather_frozen(input_tensor)
        if kept is not None or not places:
            self._decode(kept, output_tensor)
            return None
        if in_backward:
            self.passes.before_collective_in_backward(plan)
        keeps = not wire.is_exact and not in_backward and self._is_needed_again()
        is_async = async_op and input_tensor.device.type == "cpu"
        is_exact = wire.is_exact
        layout = plan.gather(places, 32 if is_exact else wire.least_bits, is_dense=is_exact)
        buffer = self._take_buffer(layout, input_tensor.device, keeps)
        gathering = Gathering(plan, layout, input_tensor, wire, buffer, async_op=is_async)

        def finish() -> None:
            with nullcontext() if in_backward else self.passes.mistakes_reach_replicas():
                payloads = gathering.finish()
            self._decode(payloads, output_tensor)
            if keeps:
                self._kept = payloads
            else:
                wire.scratch.release(buffer)

        if is_async:
            return GatheringWork(finish)
        finish()
        return None

    def _gather_frozen(self, input: Tensor) -> tuple[int, ...]:
        """See to the payloads of frozen parameters; returns the places of the others."""
        plan, wire = self._plan, self._wire
        trains = self._group.requires_grad()
        frozen = tuple(i for i in plan.places if not trains[i])
        if wire.config.gather == "twice" or not frozen:
            self._frozen = None
            return plan.places
        # Sent once, so for a warm-up too.
        layout = plan.gather(frozen, is_frozen=True)
        if self._frozen is None or self._frozen.layout is not layout:
            if compat.in_backward():
                self.passes.before_collective_in_backward(plan)
            buffer = allocate(plan.world_size * layout.payload_bytes, input.device)
            self._frozen_sum = self._sum_of_frozen()
            self._frozen = Gathering(plan, layout, input, wire, buffer, is_frozen=True).finish()
        return tuple(i for i in plan.places if trains[i])

    @property
    def has_frozen(self) -> bool:
        return self._frozen is not None

    def frozen_changed(self) -> bool:
        return self._frozen_sum != self._sum_of_frozen()

    def forget_frozen(self) -> None:
        self._frozen = None

    def drop_stale(self, is_due: bool) -> None:
        group = self._group
        is_stale = self._gathered_at is not None and (
            is_due or self._gathered_at != self.passes.now
        )
        if is_stale and group.is_gathered and group.reshards_after_backward:
            compat.reshard_module(group.module)

    def _sum_of_frozen(self) -> int:
        pairs = zip(self._group.local_shards(), self._group.requires_grad(), strict=True)
        return checksum(shard for shard, is_trained in pairs if not is_trained)

    def _is_needed_again(self) -> bool:
        # FSDP2 gathers with autograd off, and so does reentrant checkpointing compute: only the
        # module can tell a training forward from a validation.
        is_training = self._group.modules[0].training
        return self._wire.config.gather == "once" and is_training and self._group.gathers_again

    def _take_buffer(self, layout: GroupLayout, device: torch.device, keeps: bool) -> Tensor:
        """Memory for the payloads of all ranks."""
        size = self._plan.world_size * layout.payload_bytes
        if keeps:
            if self._buffer is None or self._buffer.numel() < size:
                self._buffer = allocate(size, device)
            return self._buffer[:size]
        return self._wire.scratch.acquire(size, device)

    def _decode(self, payloads: Payloads | None, output: Tensor) -> None:
        for part in (payloads, None if self._wire.is_exact else self._frozen):
            if part is not None:
                decode(self._plan, part, output, self._wire)


class ReduceScatter(_Comm):
    """The reduce-scatter of one group, and with ``replicas`` the all-reduce between replicas."""

    def __init__(
        self,
        plan: Plan,
        wire: Wire,
        group: compat.ParameterGroup,
        recorder: GradRecorder,
        passes: Passes,
        replicas: dist.ProcessGroup | None,
    ) -> None:
        self._plan, self._wire, self._group = plan, wire, group
        self._recorder, self._passes, self._replicas = recorder, passes, replicas
        # Replicas are not there while their average is put off.
        self._consents = {True: Consensus(plan, replicas), False: Consensus(plan, None)}
        self._reduced: tuple[Places, int] | None = None
        self._put_off: PutOff | None = None

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
        if compat.in_backward():
            self._passes.before_collective_in_backward(plan)
        else:
            self._passes.settle_what_was_cut_short()
        slot = wire.late.make_room(plan.index, adds=self._group.has_gradients)
        if op != dist.ReduceOp.SUM:
            raise RuntimeError(
                f"FSDP2 asks the group of {plan.name} for {op}; qsdp sums: leave "
                "set_force_sum_reduction_for_comms on"
            )
        with_grad = self._recorder.take(input_tensor.numel() // plan.world_size)

        def hops(places: Places) -> list[Hop]:
            return hops_of(plan, places, input_tensor.dtype, group, wire)

        def averaged(places: Places) -> GroupLayout:
            return plan.reduce(places, output_tensor.dtype, wire.least_bits)

        step, device = wire.clock.step, input_tensor.device
        consent = self._consents[self._group.all_reduces]
        refuse = partial(consent.refuse, with_grad, group, device)
        may_others_be_late = (
            self._replicas is None
            and self._group.only_views(output_tensor)
            and self._passes.may_be_late(plan)
        )
        is_late = may_others_be_late and self._group.may_fill_later(with_grad)
        if may_others_be_late:
            self._passes.end_late()
        try:
            consent.settle(with_grad, group, hops, step, device, averaged)
            own = hops(with_grad)
            reducing = reduce(plan, own, output_tensor, input_tensor, wire, slot, is_late=is_late)
            if not is_late:
                try:
                    self._reduced = (with_grad, exhaust(reducing))
                except SetsDiffer:
                    consent.tell_replicas(averaged(with_grad), step, device, Status.MIXED)
                    raise
                return
        except SetsDiffer:
            if not may_others_be_late:
                refuse()
            wire.late.refuse_at_the_end(LateReduce(plan.index, output_tensor, refuse))
        else:
            divide = self._group.divider(output_tensor)
            late = LateReduce(plan.index, output_tensor, refuse, reducing, slot, divide)
            wire.late.leave(late, len(own))

    def all_reduce(self, reduce_output: Tensor) -> None:
        """FSDP2's all-reduce hook: average what was just reduced over the replicas, in place.

        While `set_requires_all_reduce` puts that off, it becomes zero and its sum waits, as with
        FSDP2's own replicas.
        """
        assert self._reduced is not None
        assert self._replicas is not None
        with_grad, occurrence = self._reduced
        plan, wire, group = self._plan, self._wire, self._group
        # FSDP2 reduced it on another stream, and drops it where gradients have another type.
        reads_on_this_stream(reduce_output)
        self._add_put_off(with_grad, reduce_output)
        if not group.all_reduces:
            self._put_off_average(with_grad, reduce_output)
            return
        divisor = 1 if group.has_divisor else self._replicas.size()
        try:
            all_reduce(plan, with_grad, reduce_output, self._replicas, occurrence, wire, divisor)
        except SetsDiffer:
            self._consents[True].refuse(with_grad, plan.group, reduce_output.device)

    def _add_put_off(self, places: Places, reduced: Tensor) -> None:
        """Add to ``reduced`` the sums whose average was put off, if there are any."""
        put_off, self._put_off = self._put_off, None
        waiting = self._group.put_off
        if put_off is None or (waiting is None and put_off.number != compat.backward_number()):
            return  # the pass was cut short, or FSDP2 told to forget it
        if places != put_off.places:
            plan = self._plan
            if self._group.all_reduces:  # replicas wait
                layout = plan.reduce(places, reduced.dtype, self._wire.least_bits)
                step, device = self._wire.clock.step, reduced.device
                with suppress(RuntimeError):
                    self._consents[True].tell_replicas(layout, step, device, Status.FAILED)
            odd = sorted(set(places) ^ set(put_off.places))
            raise RuntimeError(
                f"{listed([plan.names[i] for i in odd])} had a gradient in some of the backward "
                "passes since set_requires_all_reduce(False), but not in all: use the same "
                "parameters in each, or call set_reduce_scatter_unused_params(True) (torch 2.13)"
            )
        reduced += put_off.total

    def _put_off_average(self, places: Places, reduced: Tensor) -> None:
        """Let ``reduced`` wait, and FSDP2 add zeros to the gradients in its place."""
        plan, group = self._plan, self._group
        if not compat.in_backward():
            raise RuntimeError(
                f"the group of {plan.name} is reduced outside a backward pass, where replicate_mesh"
                " cannot put the average off: leave set_requires_all_reduce(True), or shard over "
                "a 2-D mesh in place of replicate_mesh"
            )
        parameters = group.sharded_parameters()
        without = [parameters[i] for i in places if parameters[i].grad is None]
        total = reduced.clone()
        self._put_off = PutOff(places, total, compat.backward_number())
        reduced.zero_()

        def leave() -> None:
            group.set_put_off(total)
            for parameter in without:
                parameter.grad = None

        compat.after_backward(leave)


class PutOff(NamedTuple):
    """Sums of gradients over the shard group that wait for their average over replicas."""

    places: Places
    """Of the parameters."""
    total: Tensor
    number: int
    """Of the backward pass that they are from."""


class GradRecorder:
    """Records which parameters of a group got a gradient since its last reduce.

    FSDP2's reduce buffer holds only those, without names, and a size can be ambiguous. So each
    parameter says so itself, by a hook on the tensor that autograd accumulates into. That tensor is
    made by the group's first gather, and stays: it is looked for at the forward of the group's
    modules, and until it is there at every later gather of any group, for modules that are entered
    through a method of their own. Frozen parameters are watched too: they may be trained later.

    [Note: Hooks] torch keeps a tensor's hooks in C++, where Python's collector does not look: one
    that leads back to its tensor, over whatever it holds, keeps all of that for ever. So a hook on
    a tensor holds only what it writes to, and one on a module holds its owner weakly.
    """

    def __init__(self, plan: Plan, group: compat.ParameterGroup) -> None:
        self._plan, self._group = plan, group
        self._padded = [p.padded_numel(plan.world_size) for p in plan.parameters]
        self._got_grad: set[int] = set()
        self._watched: set[int] = set()
        # A block's compiler shall not look inside: what the hook finds changes from step to step.
        hook = torch.compiler.disable(partial(_watch, weakref.ref(self)))
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(hook) for module in group.modules
        ]

    def take(self, numel: int) -> tuple[int, ...]:
        """Places of the parameters in a reduce buffer of ``numel`` values a rank.

        Raises RuntimeError when what was recorded does not fill the buffer.
        """
        # Asked anew: parameters may be frozen, or trained, at any time after install.
        tensors = self._group.unsharded_parameters()
        trainable = tuple(i for i, t in enumerate(tensors) if t is not None and t.requires_grad)
        found = trainable if self._group.reduces_unused else tuple(sorted(self._got_grad))
        if numel != self._numel(found) and numel == self._numel(trainable):
            # Nothing was watched yet. A full buffer is unambiguous all the same, since every strict
            # subset is smaller.
            found = trainable
        if numel != self._numel(found):
            names = [self._plan.parameters[i].name for i in found]
            raise RuntimeError(
                f"FSDP2 reduces {numel} values a rank for the group of {self._plan.name}, but "
                f"{self._numel(found)} belong to the parameters seen to get a gradient "
                f"({', '.join(names) or 'none'}): call its module through forward(), and let "
                "autograd bring its gradients, since qsdp does not see those that are set by hand"
            )
        self._got_grad.clear()
        return found

    def watch(self) -> bool:
        """Hook on to the tensors that have come into being. Returns whether all have by now."""
        num_parameters = len(self._plan.parameters)
        if len(self._watched) < num_parameters:
            for i, tensor in enumerate(self._group.unsharded_parameters()):
                if tensor is not None and i not in self._watched:
                    self._watched.add(i)
                    self._hook_on(tensor, partial(_record, self._got_grad, i))
        return len(self._watched) == num_parameters

    def forget_what_was_dropped(self) -> None:
        """Keep only records of gradients that still wait: a backward may have been cut short."""
        self._got_grad &= self._group.pending_gradients()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook_on(self, tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
        if not tensor.is_floating_point() or tensor.is_inference():  # no gradient will ever come
            return
        is_trained = tensor.requires_grad
        tensor.requires_grad_(True)  # torch hooks on to no other
        self._handles.append(tensor.register_post_accumulate_grad_hook(hook))
        tensor.requires_grad_(is_trained)

    def _numel(self, places: Sequence[int]) -> int:
        return sum(self._padded[i] for i in places)


def _watch(recorder: weakref.ref[GradRecorder], *_: object) -> None:
    if (found := recorder()) is not None:
        found.watch()


def _record(got_grad: set[int], place: int, _: Tensor) -> None:
    got_grad.add(place)
