"""What changes while training: bits that follow a budget, levels that are learned."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qsdp import compat
from qsdp.comm.levels import Counts, offset
from qsdp.comm.measure import Meter, allot
from qsdp.comm.plan import Parameter, Plan
from qsdp.comm.wire import Wire
from qsdp.config import CODED_BITS


class Adaptation:
    """Sets bits and levels of all plans between two steps, alike on all ranks.

    Args:
        plans, groups: of the handle's groups.
        wire: with the config and the step.
        everyone: process groups that together reach all ranks, one after the other.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        groups: Sequence[compat.ParameterGroup],
        wire: Wire,
        everyone: Sequence[dist.ProcessGroup],
    ) -> None:
        self._plans, self._groups, self._wire, self._everyone = plans, groups, wire, everyone
        self._settled = -1
        self._bits: dict[int, tuple[int, int]] = {}
        self._meter: Meter | None = None
        self._counts: Counts | None = None

    def settle(self) -> None:
        """Do what is due before the step that a gather now would belong to; a collective when
        something is due."""
        step = self._wire.clock.next_step
        if step <= self._settled:
            return
        self._settled = step
        if self._meter is not None:
            self._wire.meters.remove(self._meter)
            self._allot(self._meter)
            self._meter = None
        levels = self._wire.levels
        if levels is not None and step in self._wire.config.level_steps:
            counts = self._counts or self._new_counts()
            self.measure_weights(counts)
            levels.learn(counts, self._everyone)
        if self._counts is not None:
            self._wire.meters.remove(self._counts)
            self._counts = None
        self._watch(step)

    def measure_weights(self, meter: Meter | Counts) -> None:
        """Let ``meter`` look at this rank's shards."""
        for plan, group in zip(self._plans, self._groups, strict=True):
            side = plan.gather(plan.places)
            rows = side.tables[plan.rank].tolist()
            for row, parameter, shard in zip(
                rows, plan.parameters, group.local_shards(), strict=True
            ):
                meter.add_values(row, _flat(shard, parameter), is_grad=False)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know: integers and lists of them."""
        self.settle()
        bits = [[index, *both] for index, both in sorted(self._bits.items())]
        levels = [] if self._wire.levels is None else self._wire.levels.state()
        return {"settled": self._settled, "bits": bits, "levels": levels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._settled = int(state.get("settled", -1))
        self._set_bits({int(i): (int(w), int(g)) for i, w, g in state.get("bits", [])})
        if self._wire.levels is not None:
            self._wire.levels.load(state.get("levels", []))
        self._watch(self._wire.clock.next_step)

    def _watch(self, step: int) -> None:
        """Look at the gradients of ``step`` if bits are allotted or levels learned after it."""
        config = self._wire.config
        if config.levels == "learned" and step + 1 in config.level_steps and not self._counts:
            self._counts = self._new_counts()
            self._wire.meters.append(self._counts)
        is_due = config.budget is not None and step == config.warmup_steps
        if is_due and not self._bits and self._meter is None:
            self._meter = Meter(config, self._wire.level_values, CODED_BITS)
            self._wire.meters.append(self._meter)

    def _new_counts(self) -> Counts:
        """For all levels that this step's and later payloads may use."""
        config = self._wire.config
        places = []
        for p in (p for plan in self._plans for p in plan.parameters):
            local = config.local_grad_bits or 8
            for bits, is_grad in ((p.weight_bits, False), (p.grad_bits, True), (local, True)):
                start = offset(config, p.index, bits, is_grad=is_grad)
                places += [(start, bits)] if start >= 0 else []
        return Counts(places)

    def _allot(self, meter: Meter) -> None:
        budget = self._wire.config.budget
        assert budget is not None
        self.measure_weights(meter)
        everyone = {p.index: p for plan in self._plans for p in plan.parameters}
        bits = {index: [p.weight_bits, p.grad_bits] for index, p in everyone.items()}
        for is_grad in (False, True):
            coded = [p for p in everyone.values() if bits[p.index][is_grad] <= 8]
            keys = [(p.index, is_grad, b) for p in coded for b in CODED_BITS]
            errors = meter.totals(keys, self._everyone)[:, 0].view(len(coded), -1).tolist()
            numels = [p.shape.numel() for p in coded]
            chosen = allot(numels, errors, budget, self._wire.config, is_grad=is_grad)
            for parameter, b in zip(coded, chosen, strict=True):
                bits[parameter.index][is_grad] = b
        self._set_bits({index: (weight, grad) for index, (weight, grad) in bits.items()})

    def _set_bits(self, bits: dict[int, tuple[int, int]]) -> None:
        self._bits = bits
        if bits:
            for plan in self._plans:
                plan.set_bits([bits[p.index] for p in plan.parameters])


def _flat(shard: Tensor, parameter: Parameter) -> Tensor:
    return shard.detach().to(parameter.dtype).reshape(-1)
