"""One reduce of the simulated ranks: its stages, and the order of its sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qsdp.codec.random_numbers import KeyStage
from qsdp.simulation.simulated_wire import SimulatedWire


class Reduction:
    """The reduction of all simulated ranks, which bring gradients in the order of their ranks.

    rotation  rows are rotated before they are quantized first, and what is summed is rotated back;
              between quantized replicas once more
    stages    in the first every row is quantized for that rank of the sender's unit that has its
              destination's place there; each unit then quantizes its fp32 sum for that unit of the
              next larger one which has the destination's place, and so on. Rows and sums are added
              in fp32 in the order of places. What a rank keeps to itself is exact in all stages
              (in two, after ZeRO++, arXiv 2306.10209)
    replicas  native: added in the reduce dtype. Quantized: every replica's sum, the own one too, is
              quantized; they are added in fp32 in replica order and divided by their number
    """

    def __init__(self, wire: SimulatedWire, step: int) -> None:
        self._wire, self._step = wire, step
        world = wire.world
        # What FSDP2 divides by: it knows of replicas only when the all-reduce is its own.
        self._divisor = float(
            world.world_size * (1 if world.quantized_replicas else world.replicas)
        )
        self._before = 1.0
        if world.reduce_dtype == torch.float16:
            self._before = _fp16_predivisor(self._divisor)
        self._num_added = 0
        self._names: set[str] = set()
        self._sums: list[dict[tuple[str, int], Tensor]] = [{} for _ in wire.stages]
        """The sums of the unit that is being summed, by stage."""
        self._replicas: dict[tuple[str, int], Tensor] = {}

    def add(self, grads: Mapping[str, Tensor]) -> None:
        """Bring the whole gradients of the next rank.

        Raises RuntimeError when it has gradients for other parameters than the ranks before it.
        """
        world = self._wire.world
        sender, self._num_added = self._num_added, self._num_added + 1
        rank = sender % world.world_size
        odd = sorted(grads.keys() ^ self._names)
        if sender and odd:
            raise RuntimeError(
                f"rank {sender} and the ranks before it differ in whether {odd[0]} gets a "
                "gradient, where FSDP2 would fail: let all ranks use the same parameters."
            )
        self._names = set(grads)
        for name, grad in grads.items():
            for receiver, whole in enumerate(self._wire.sharding.cut(name, grad.div(self._before))):
                row = self._wire.kept_grads.pick(name, whole, receiver)
                row = self._wire.rotated(name, row, self._step)
                self._exchange(0, name, row, sender, receiver)
        for place, each in enumerate(self._wire.stages[1:], start=1):
            if (rank + 1) % each.stride == 0:
                self._send_on(place, sender // each.stride)
        if rank == world.world_size - 1:
            self._add_between_replicas(sender // world.world_size)

    def results(self) -> Iterable[tuple[str, int, Tensor]]:
        """(name, rank in the shard group, mean gradient in the reduce dtype)."""
        world = self._wire.world
        assert self._num_added == world.num_ranks
        for (name, receiver), total in self._replicas.items():
            if world.quantized_replicas:
                total = self._wire.rotated(name, total, self._step)
                total = total.div(float(world.replicas)).to(world.reduce_dtype)
            mean = total.div(self._divisor / self._before)
            yield name, receiver, self._wire.kept_grads.spread(name, mean, receiver)

    def _send_on(self, place: int, unit: int) -> None:
        """Send what the ranks of a ``unit`` of the stage before have summed into stage ``place``.

        Units are counted over all replicas.
        """
        each, before = self._wire.stages[place], self._sums[place - 1]
        for (name, receiver), total in before.items():
            sender = unit * each.stride + receiver % each.stride
            self._exchange(place, name, total, sender, receiver)
        before.clear()

    def _exchange(self, place: int, name: str, row: Tensor, sender: int, receiver: int) -> None:
        """Bring a row to whoever sums it in a stage, which may be the sender itself."""
        each = self._wire.stages[place]
        is_own = each.digit(sender) == each.digit(receiver)
        self._add(self._sums[place], name, row, each.stage, sender, receiver, is_own)

    def _add_between_replicas(self, replica: int) -> None:
        world = self._wire.world
        for place, total in self._sums[-1].items():
            name, receiver = place
            total = self._wire.rotated(name, total, self._step).to(world.reduce_dtype)
            if world.quantized_replicas:
                total = self._wire.rotated(name, total, self._step)
                sender = replica * world.world_size + receiver
                self._add(self._replicas, name, total, KeyStage.REPLICAS, sender, receiver, False)
            elif place in self._replicas:
                self._replicas[place] = self._replicas[place] + total
            else:
                self._replicas[place] = total
        self._sums[-1].clear()

    def _add(
        self,
        sums: dict[tuple[str, int], Tensor],
        name: str,
        row: Tensor,
        stage: KeyStage,
        sender: int,
        receiver: int,
        is_own: bool,
    ) -> None:
        """Add a row in fp32: as it is, or as it is decoded."""
        if is_own:
            row = row.float()
        else:
            row = self._wire.grad(name, row, stage, self._step, sender, receiver)
        place = (name, receiver)
        sums[place] = sums[place] + row if place in sums else row


def _fp16_predivisor(divisor: float) -> float:
    """The power of two near sqrt(divisor) by which FSDP2 divides before an fp16 reduce."""
    before = 1.0
    while divisor % before == 0 and divisor / before > before:
        before *= 2
    return before
