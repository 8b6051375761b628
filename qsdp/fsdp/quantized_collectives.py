"""qsdp's objects in the place of FSDP2's own collectives, until they are taken out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from qsdp.comm.group_plan import Plan
from qsdp.comm.wire_state import Wire
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.fsdp.gather_hook import AllGatherHook
from qsdp.fsdp.grad_recorder import GradRecorder
from qsdp.fsdp.passes import Passes
from qsdp.fsdp.reduce_hook import ReduceScatterHook


class InstalledComms:
    """The quantized collectives of one handle's groups, given to FSDP2 in place of its own.

    ``gathers`` are by plan, and so is ``given``: what FSDP2 was given, its ``comms``.

    Args:
        plans, groups: Those of the handle.
        wire, passes: What the groups share.
        replicas: The ranks that hold the same shards, where qsdp averages over them.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        groups: Sequence[ParameterGroup],
        wire: Wire,
        passes: Passes,
        replicas: dist.ProcessGroup | None,
    ) -> None:
        self._groups = groups
        self._before = [group.comms() for group in groups]
        self._recorders = [
            GradRecorder(plan, group) for plan, group in zip(plans, groups, strict=True)
        ]
        self.gathers: list[AllGatherHook] = []
        unwatched: set[GradRecorder] = set()
        for plan, group, recorder in zip(plans, groups, self._recorders, strict=True):
            gather = AllGatherHook(plan, wire, group, recorder, unwatched, passes)
            reduce = ReduceScatterHook(plan, wire, group, recorder, passes, replicas)
            self.gathers.append(gather)
            hook = None if replicas is None else reduce.all_reduce
            *_, all_reduce_hook, async_op = group.comms()
            async_op |= group.mesh.device_type == "cpu"
            group.set_comms(gather, reduce, True, hook or all_reduce_hook, async_op)
        self.given = [group.comms() for group in groups]

    def remove(self) -> None:
        """Give FSDP2 back what it had before, except what the user has set since."""
        for recorder in self._recorders:
            recorder.remove()
        pairs = zip(self._before, self.given, strict=True)
        for group, (before, given) in zip(self._groups, pairs, strict=True):
            gather, reduce, force_sum, hook, async_op = (
                was if now is own else now
                for was, own, now in zip(before, given, group.comms(), strict=True)
            )
            group.set_comms(gather, reduce, force_sum, hook, async_op)
