"""How many bytes the simulated ranks would send: arithmetic on layouts, or on frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qsdp.codec.payload import Layout, Segment
from qsdp.codec.random_numbers import KeyStage
from qsdp.simulation.simulated_frames import SimulatedFrames
from qsdp.simulation.simulated_wire import SimulatedWire
from qsdp.simulation.stages import SimulatedStage

_NEWS_BYTES = 48
"""What a rank tells those of its node of the frames that it has seen."""


@dataclass(frozen=True, kw_only=True)
class SimulatedVolume:
    """The volume of a simulated step: bytes that one rank sends, headers and metadata included.

    A payload counts once for every peer that it is meant for.
    """

    gather_intra_node: int
    gather_inter_node: int
    reduce_intra_node: int
    reduce_inter_node: int
    num_parameters: int
    """Values in the model's parameters, those that need no gradient included."""

    @property
    def gather(self) -> int:
        """Bytes of gathers."""
        return self.gather_intra_node + self.gather_inter_node

    @property
    def reduce(self) -> int:
        """Bytes of reduces."""
        return self.reduce_intra_node + self.reduce_inter_node

    @property
    def per_parameter(self) -> float:
        """Bytes a parameter."""
        return (self.gather + self.reduce) / self.num_parameters


def count_bytes(
    wire: SimulatedWire,
    shards: Mapping[str, Tensor],
    *,
    num_parameters: int,
    rank: int,
    micro_batches: int,
    reshard_after_forward: bool | None,
) -> SimulatedVolume:
    """Count the volume of a simulated step in bytes: see ``Simulation.wire_bytes``.

    ``shards`` are those of the shard group's first rank: all ranks' payloads have the sizes of its.
    """
    world, sent = wire.world, _Sent(wire.world.ranks_per_node, rank)
    size = world.world_size
    replicas = range(rank % size, world.num_ranks, size) if world.quantized_replicas else ()
    for group in sorted(set(wire.numbers.groups.values())) if size > 1 else ():
        members = {n: shard for n, shard in shards.items() if wire.numbers.groups[n] == group}
        is_kept = reshard_after_forward is False or wire.config.gather == "once"
        is_kept |= reshard_after_forward is None and group == wire.numbers.root
        decodes = micro_batches * (1 if is_kept else 2)
        if wire.grids is None:
            gathered = {n: each for n, each in members.items() if not wire.is_sent_once(each, None)}
            num_bytes = _weight_payload_bytes(wire, gathered) * decodes
            sent.over("gather", wire.stages, rank, num_bytes)
        else:
            frames = wire.grids.frames
            _count_changes(sent, wire, frames, group, members, rank, micro_batches, decodes)
        trained = {n: shard for n, shard in members.items() if shard.requires_grad}
        num_rows, dtype = size, world.reduce_dtype
        for each in wire.stages:
            num_rows //= each.size  # for one peer
            row_bytes = _gradient_payload_bytes(wire, trained, each.stage, dtype)
            sent.to("reduce", each.peers(rank), row_bytes * num_rows)
            dtype = torch.float32
        row_bytes = _gradient_payload_bytes(wire, trained, KeyStage.REPLICAS, world.reduce_dtype)
        sent.to("reduce", replicas, row_bytes)
    return SimulatedVolume(
        gather_intra_node=sent.bytes["gather", True],
        gather_inter_node=sent.bytes["gather", False],
        reduce_intra_node=sent.bytes["reduce", True],
        reduce_inter_node=sent.bytes["reduce", False],
        num_parameters=num_parameters,
    )


class _Sent:
    """Bytes by direction and by whether they stay on the node."""

    def __init__(self, ranks_per_node: int, rank: int) -> None:
        self.bytes: Counter[tuple[str, bool]] = Counter()
        self._ranks_per_node, self._rank = ranks_per_node, rank

    def to(self, direction: str, ranks: Iterable[int], num_bytes: int) -> None:
        """Count ``num_bytes`` to each of ``ranks``, except the sender."""
        node = self._rank // self._ranks_per_node
        for peer in ranks:
            if peer != self._rank:
                self.bytes[direction, peer // self._ranks_per_node == node] += num_bytes

    def over(
        self, direction: str, stages: Sequence[SimulatedStage], rank: int, num_bytes: int
    ) -> None:
        """Count an all-gather of ``num_bytes`` a rank: what it got in a stage it hands on."""
        for each in reversed(stages):
            self.to(direction, each.peers(rank), num_bytes)
            num_bytes *= each.size


def _count_changes(
    sent: _Sent,
    wire: SimulatedWire,
    frames: SimulatedFrames,
    group: int,
    members: Mapping[str, Tensor],
    rank: int,
    micro_batches: int,
    decodes: int,
) -> None:
    """Count the gathers of a group's changes in a step, which decodes the rows so many times."""
    size, stages, ranks_per_node = wire.world.world_size, wire.stages, 1
    if wire.config.delta_codes == "node":
        ranks_per_node, stages = stages[0].size, stages[1:]
        # The rows of a rank's place in all nodes, and what it has heard of frames.
        rows = _kept_row_bytes(wire, members) * size // ranks_per_node
        sent.over("gather", wire.stages[:1], rank, rows * decodes + _NEWS_BYTES * micro_batches)
    owners = range(rank % size % ranks_per_node, size, ranks_per_node)
    sent.over("gather", stages, rank, _frame_bytes(frames, group, micro_batches, owners))


def _frame_bytes(
    frames: SimulatedFrames, group: int, micro_batches: int, owners: Iterable[int]
) -> int:
    """Bytes of one rank's frames, that go with those of ``owners``: a backward pass sends none.

    Raises ValueError before the first.
    """
    found = frames.sent_bytes(group, micro_batches, owners)
    if found is None:
        raise ValueError(
            "wire_bytes is of the last step that has sent changes with gather='delta', but none "
            "has: take a step first, behind a warm-up and outside aside()."
        )
    return found


def _weight_payload_bytes(wire: SimulatedWire, shards: Mapping[str, Tensor]) -> int:
    """Bytes of one payload; nothing is sent for no parameters."""
    segments = _weight_segments(wire, shards)
    return Layout(segments, 0).payload_bytes if segments else 0


def _kept_row_bytes(wire: SimulatedWire, shards: Mapping[str, Tensor]) -> int:
    """Bytes of one kept row."""
    segments = _weight_segments(wire, shards)
    kept = [replace(segment, keeps_epochs=segment.bits > 0) for segment in segments]
    return Layout(kept, 0).payload_bytes


def _weight_segments(wire: SimulatedWire, shards: Mapping[str, Tensor]) -> list[Segment]:
    return [
        wire.codec.segment(
            name,
            shard.numel(),
            wire.weight_dtype(shard),
            wire.weight_bits(name, None),
            is_grad=False,
        )
        for name, shard in shards.items()
    ]


def _gradient_payload_bytes(
    wire: SimulatedWire, shards: Mapping[str, Tensor], stage: KeyStage, dtype: torch.dtype
) -> int:
    segments = [
        wire.codec.segment(
            name, shard.numel(), dtype, wire.grad_bits(name, stage, None), is_grad=True
        )
        for name, shard in shards.items()
    ]
    return Layout(segments, 0).payload_bytes if segments else 0
