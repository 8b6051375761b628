"""The two objects that FSDP2 calls instead of its own collectives."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from qsdp import compat
from qsdp.comm.clock import Clock
from qsdp.comm.consent import Consent, Hop, Places
from qsdp.comm.gather import gather, regather
from qsdp.comm.plan import Plan
from qsdp.comm.reduce import SetsDiffer, reduce
from qsdp.comm.scratch import Scratch
from qsdp.comm.traffic import Traffic


class Wire:
    """What all groups of one handle share."""

    def __init__(self, clock: Clock, traffic: Traffic) -> None:
        self.clock = clock
        self.traffic = traffic
        self.scratch = Scratch()
        self.recorders: list[GradRecorder] = []
        self.is_exact = False


class _Comm:
    """What FSDP2 asks of both objects besides the collective itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Comm):
    """The all-gather of one group."""

    def __init__(
        self, plan: Plan, wire: Wire, recorder: "GradRecorder", regather_world_size: int | None
    ) -> None:
        self._plan, self._wire, self._recorder = plan, wire, recorder
        self._regather_world_size = regather_world_size

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Gather on the current stream. Returning None tells FSDP2 that there is no Work to wait
        for: its own event, recorded right after this call, orders what follows."""
        plan, wire = self._plan, self._wire
        if group.size() == self._regather_world_size and group is not plan.group:
            regather(output_tensor, input_tensor, group, wire.traffic)
            return
        side = plan.exact_gather if wire.is_exact else plan.gather
        given = input_tensor.numel() * input_tensor.element_size()
        if group.size() != plan.world_size or given != side.layout.buffer_bytes:
            raise RuntimeError(
                f"FSDP2 gathers {given} bytes over {group.size()} ranks for the group of "
                f"{plan.name}, but its plan has {side.layout.buffer_bytes} over {plan.world_size}: "
                "install qsdp after the model has its final parameters, dtypes and sharding"
            )
        for recorder in wire.recorders:
            recorder.watch()
        in_backward = compat.in_backward()
        if not in_backward:
            self._recorder.forget_what_was_dropped()
        if not wire.is_exact:
            wire.clock.before_gather(in_backward)
        gather(plan, side, output_tensor, input_tensor, wire.clock, wire.traffic, wire.scratch)


class ReduceScatter(_Comm):
    """The reduce-scatter of one group."""

    def __init__(self, plan: Plan, wire: Wire, recorder: "GradRecorder") -> None:
        self._plan, self._wire, self._recorder = plan, wire, recorder
        self._consent = Consent(plan)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Reduce on the current stream, complete in stream order on return."""
        plan, wire = self._plan, self._wire
        if op != dist.ReduceOp.SUM:
            raise RuntimeError(
                f"FSDP2 asks the group of {plan.name} for {op}; qsdp sums: leave "
                "set_force_sum_reduction_for_comms on"
            )
        numel = input_tensor.numel() // plan.world_size
        with_grad = self._recorder.take(numel)

        def hops(places: Places) -> list[Hop]:
            return [(plan.reduce(places, input_tensor.dtype), 1, group)]

        self._consent.settle(with_grad, group, hops, wire.clock.step)
        side = plan.reduce(with_grad, input_tensor.dtype)
        out, inp = output_tensor, input_tensor
        try:
            reduce(plan, side, out, inp, group, wire.clock, wire.traffic, wire.scratch)
        except SetsDiffer:
            self._consent.refuse(with_grad, group)


class GradRecorder:
    """Records which parameters of a group got a gradient since its last reduce.

    FSDP2's reduce buffer holds only those, without names, and a size can be ambiguous. So each
    parameter says so itself, by a hook on the tensor that autograd accumulates into. That tensor is
    made by the group's first gather: it is looked for at the forward of the group's modules, and at
    every later gather of any group, for modules that are entered through a method of their own.
    """

    def __init__(self, plan: Plan, group: compat.ParameterGroup) -> None:
        self._plan, self._group = plan, group
        self._padded = [p.padded_numel(plan.world_size) for p in plan.parameters]
        self._got_grad: set[int] = set()
        self._watched: dict[int, RemovableHandle] = {}
        # A block's compiler shall not look inside: what the hook finds changes from step to step.
        hook = torch.compiler.disable(lambda *_: self.watch())
        self._handles = [module.register_forward_pre_hook(hook) for module in group.modules]

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
                f"({', '.join(names) or 'none'}): call its module through forward() first"
            )
        self._got_grad.clear()
        return found

    def watch(self) -> None:
        """Hook on to the tensors that have come into being since the last call."""
        if len(self._watched) == len(self._plan.parameters):
            return
        for i, tensor in enumerate(self._group.unsharded_parameters()):
            if tensor is not None and tensor.requires_grad and i not in self._watched:
                hook = partial(self._record, i)
                self._watched[i] = tensor.register_post_accumulate_grad_hook(hook)

    def forget_what_was_dropped(self) -> None:
        """Keep only records of gradients that still wait: a backward may have been cut short."""
        self._got_grad &= self._group.pending_gradients()

    def remove(self) -> None:
        for handle in (*self._handles, *self._watched.values()):
            handle.remove()

    def _numel(self, places: Sequence[int]) -> int:
        return sum(self._padded[i] for i in places)

    def _record(self, place: int, _: Tensor) -> None:
        self._got_grad.add(place)
