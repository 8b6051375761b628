"""Kept grids out of a rank's row, and back into the rows that all ranks keep: one all-gather.

A rank packs what it has of a group, 12 bytes a bucket: of each coded parameter all minima, all
scales and all epochs, of as many buckets as the largest shard has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qsdp.codec.payload import EPOCH_BYTES, META_BYTES
from qsdp.codec.segment_table import SegmentRow
from qsdp.comm import transport
from qsdp.comm.buffers import as_bytes
from qsdp.comm.group_plan import Plan
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import collective
from qsdp.ops.reference.kept_grids import KeptGrids, kept_grids


def kept_buckets(plan: Plan) -> dict[int, int]:
    """By the places of coded parameters, the buckets of the largest shard.

    Empty where a rank is alone, to whom nothing is sent.
    """
    segments = plan.kept_rows().segments if plan.world_size > 1 else ()
    return {
        place: -(-segment.padded // segment.bucket)
        for place, segment in enumerate(segments)
        if segment.bits and segment.padded
    }


def grids_of_row(
    row: Tensor | None,
    segments: Sequence[SegmentRow],
    buckets: Mapping[int, int],
    device: torch.device,
) -> dict[int, KeptGrids]:
    """By place, copies of the kept grids of a row; NaN and zeros behind them.

    Args:
        row: uint8 [row bytes]; None stands for one that nothing was sent of.
        segments: Those of the row.
        buckets: By place, of how many buckets the grids are to be.
        device: That of the grids.
    """
    found = {}
    for place, num in buckets.items():
        low, scale = torch.full((num,), torch.nan, device=device), torch.zeros(num, device=device)
        grids = KeptGrids(low, scale, torch.zeros(num, dtype=torch.int32, device=device))
        if row is not None:
            for part, kept in zip(grids, kept_grids(segments[place], row), strict=True):
                part[: kept.numel()] = kept
        found[place] = grids
    return found


def exchange_grids(plan: Plan, wire: Wire, own: Mapping[int, KeptGrids]) -> Tensor:
    """The packed grids of all ranks, uint8 [ranks, bytes]: a collective of the shard group.

    Args:
        plan: How the group travels.
        wire: With the counters and the step.
        own: This rank's by place, each fp32, fp32 and int32 [buckets of the largest shard].
    """
    parts = [as_bytes(part) for place in sorted(own) for part in own[place]]
    mine = torch.cat(parts)
    everyone = mine.new_empty(plan.world_size * mine.numel())
    with (
        collective("exchange of grids", plan.names, wire.clock.step),
        wire.times.measure("gather", "wire", mine.device),
    ):
        transport.start_all_gather(everyone, mine, plan.group).wait()
    wire.traffic.gathered("gather", plan.group, mine.numel())
    return everyone.view(plan.world_size, -1)


def fill_grids(
    row: Tensor, segments: Sequence[SegmentRow], buckets: Mapping[int, int], packed: Tensor
) -> None:
    """Put a rank's ``packed`` grids into its kept row.

    Args:
        row: uint8 [row bytes].
        segments: Those of the row. Behind the buckets that one has nothing is taken.
        buckets: By place, how many buckets of a coded segment are packed.
        packed: uint8 [bytes].
    """
    start = 0
    for place, num_packed in sorted(buckets.items()):
        segment, size = segments[place], num_packed * (META_BYTES + EPOCH_BYTES)
        low, scale, epoch = packed.narrow(0, start, size).view(torch.int32).view(3, -1)
        meta, epochs = segment.meta(row).view(torch.int32).view(-1, 2), segment.epochs(row)
        assert epochs is not None
        num = len(meta)
        meta[:, 0], meta[:, 1] = low[:num], scale[:num]
        epochs.view(torch.int32).copy_(epoch[:num])
        start += size
