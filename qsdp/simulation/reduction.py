"""One reduce of the simulated ranks: its hops, and the order of its sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qsdp.simulation.reference import BETWEEN_NODES, BETWEEN_REPLICAS, FLAT, IN_NODE, Wire


class Reduction:
    """One reduce of all ranks, which bring their gradients in the order of their ranks.

    flat      every row but a rank's own is quantized; rows are added in fp32 in rank order
    two hops  inside a node every row is quantized for the local rank of its destination; each node
              then quantizes its fp32 sum for the destination, where sums are added in node order.
              What a rank keeps to itself is exact in both hops (after ZeRO++, arXiv 2306.10209)
    replicas  native: added in the reduce dtype. Quantized: every replica's sum, the own one too, is
              quantized; they are added in fp32 in replica order and divided by their number
    """

    def __init__(self, wire: Wire, step: int) -> None:
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
        self._node: dict[tuple[str, int], Tensor] = {}
        self._shards: dict[tuple[str, int], Tensor] = {}
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
                "gradient, where FSDP2 would fail; let all ranks use the same parameters"
            )
        self._names = set(grads)
        for name, grad in grads.items():
            for receiver, whole in enumerate(self._wire.sharding.cut(name, grad.div(self._before))):
                row = self._wire.kept_grads.pick(name, whole, receiver)
                if self._wire.is_two_hop:
                    self._add_in_node(name, row, sender, receiver)
                else:
                    is_own = rank == receiver
                    self._add(self._shards, name, row, FLAT, sender, receiver, is_own)
        if self._wire.is_two_hop and (rank + 1) % world.ranks_of_a_node == 0:
            self._add_between_nodes(sender // world.ranks_of_a_node)
        if rank == world.world_size - 1:
            self._add_between_replicas(sender // world.world_size)

    def results(self) -> Iterable[tuple[str, int, Tensor]]:
        """(name, rank in the shard group, mean gradient in the reduce dtype)."""
        world = self._wire.world
        assert self._num_added == world.num_ranks
        for (name, receiver), total in self._replicas.items():
            if world.quantized_replicas:
                total = total.div(float(world.replicas)).to(world.reduce_dtype)
            mean = total.div(self._divisor / self._before)
            yield name, receiver, self._wire.kept_grads.spread(name, mean, receiver)

    def _add_in_node(self, name: str, row: Tensor, sender: int, receiver: int) -> None:
        local = self._wire.world.ranks_of_a_node
        is_own = sender % local == receiver % local
        self._add(self._node, name, row, IN_NODE, sender, receiver, is_own)

    def _add_between_nodes(self, node: int) -> None:
        """Send the sums of ``node``, counted over all replicas."""
        world = self._wire.world
        local = world.ranks_of_a_node
        here = node % (world.world_size // local)
        for (name, receiver), total in self._node.items():
            sender = node * local + receiver % local
            is_own = receiver // local == here
            self._add(self._shards, name, total, BETWEEN_NODES, sender, receiver, is_own)
        self._node.clear()

    def _add_between_replicas(self, replica: int) -> None:
        world = self._wire.world
        for place, total in self._shards.items():
            name, receiver = place
            total = total.to(world.reduce_dtype)
            if world.quantized_replicas:
                sender = replica * world.world_size + receiver
                self._add(self._replicas, name, total, BETWEEN_REPLICAS, sender, receiver, False)
            elif place in self._replicas:
                self._replicas[place] = self._replicas[place] + total
            else:
                self._replicas[place] = total
        self._shards.clear()

    def _add(
        self,
        sums: dict[tuple[str, int], Tensor],
        name: str,
        row: Tensor,
        hop: int,
        sender: int,
        receiver: int,
        is_own: bool,
    ) -> None:
        """Add a row in fp32: as it is, or as it is decoded."""
        if is_own:
            row = row.float()
        else:
            row = self._wire.grad(name, row, hop, self._step, sender, receiver)
        place = (name, receiver)
        sums[place] = sums[place] + row if place in sums else row


def _fp16_predivisor(divisor: float) -> float:
    """The power of two near sqrt(divisor) by which FSDP2 divides before an fp16 reduce."""
    before = 1.0
    while divisor % before == 0 and divisor / before > before:
        before *= 2
    return before
