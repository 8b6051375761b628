"""The object that FSDP2 calls for the all-gather of one group."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor

from qsdp.comm.all_gather import GatheringWork, WeightGather, regather
from qsdp.comm.group_plan import Plan
from qsdp.comm.kept_codes import KeptCodes
from qsdp.comm.quantization_error import Meter
from qsdp.comm.weight_cache import Source, WeightCache
from qsdp.comm.wire_state import Wire
from qsdp.common.checksum import checksum
from qsdp.compat.autograd import is_in_backward
from qsdp.compat.comm_buffers import CommBuffers
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.compat.resharding import reshard_module
from qsdp.fsdp.grad_recorder import GradRecorder
from qsdp.fsdp.passes import Passes
from qsdp.ops.reference.kept_grids import KeptGrids


class AllGatherHook(CommBuffers):
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
        self._was_aside = self._was_warm = False

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
        plan, wire, in_backward = self._plan, self._wire, is_in_backward()
        if group.size() == self._group.regather_world_size and group is not plan.group:
            if in_backward:
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
        if not in_backward:
            self.cache.forget_trained()
            self._recorder.forget_what_was_dropped()
            self.passes.before_gather(plan)
            if self.passes.trains:
                self.note_side()
        self._gathered_at = self.passes.now
        if self._kept is not None and not wire.is_exact and self._gathers == "delta":
            return self._gather_changes(self._kept, input_tensor, output_tensor, async_op)
        self._was_warm |= wire.clock.step < wire.config.warmup_steps
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
            with self._mistakes_reach_replicas(in_backward):
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
        in_backward = is_in_backward()
        if in_backward:
            if kept.is_of(self._wire.clock.step):
                if kept.is_by_node:
                    self.passes.before_collective_in_backward(self._plan)
                kept.decode(output)
                return None
            self.passes.before_collective_in_backward(self._plan)
        if self._was_warm:
            self.cache.free()  # what the warm-up kept is as large as it sent
            self._was_warm = False
        is_async = async_op and input.device.type == "cpu"
        shards = self._group.local_shards()
        kept.begin(input, self._group.requires_grad(), shards, async_op=is_async)

        def finish() -> None:
            with self._mistakes_reach_replicas(in_backward):
                kept.settle()
            kept.decode(output)

        if is_async:
            return GatheringWork(finish)
        finish()
        return None

    def _mistakes_reach_replicas(self, in_backward: bool) -> AbstractContextManager[None]:
        """Inside, a mistake reaches replicas that wait for an average: not from a backward pass."""
        return nullcontext() if in_backward else self.passes.meetings.mistakes_reach_replicas()

    def note_side(self) -> None:
        """Remember whether a forward pass that a backward pass may follow is in an aside.

        Not of others: weights may be evaluated in between. What is gathered already is not again.
        """
        self._was_aside = self._wire.is_aside

    @property
    def has_changed_sides(self) -> bool:
        """Whether weights are others than in the last forward pass: one was in an aside."""
        return self._kept is not None and self._was_aside != self._wire.is_aside

    @property
    def _gathers(self) -> str:
        return self._wire.gathers(self._wire.clock.step)

    @property
    def num_bytes(self) -> int:
        """Bytes that kept payloads and codes take on this rank."""
        return self.cache.num_bytes + (0 if self._kept is None else self._kept.num_bytes)

    def measure_codes(self, meter: Meter) -> None:
        """Let ``meter`` compare this rank's weights with the codes of a gather for training now."""
        group, plan, wire = self._group, self._plan, self._wire
        is_due = wire.gathers(wire.clock.next_step) == "delta" and not wire.is_exact
        if self._kept is not None and plan.world_size > 1 and is_due:
            self._kept.measure(meter, group.local_shards(), group.requires_grad())

    def settle(self) -> None:
        """Apply what has arrived of the weights' changes, if any is under way."""
        if self._kept is not None:
            self._kept.settle()

    def forget_codes(self) -> None:
        """Draw all weights anew with the next gather, as all ranks do."""
        if self._kept is not None:
            self._kept.forget()

    def own_grids(self) -> dict[int, KeptGrids]:
        """By place, copies of this rank's kept grids; none where no changes are sent."""
        device = self._group.local_shards()[0].device
        return {} if self._kept is None else self._kept.own_grids(device)

    def restore_codes(self, own: Mapping[int, KeptGrids]) -> None:
        """Send all codes with the next gather, on grids of which this rank's ``own`` are given."""
        if self._kept is not None:
            self._kept.restore(own)

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
        return self._gathers == "once" and is_training and self._group.gathers_again
