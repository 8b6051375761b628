"""[Note: Support] Which weights are exactly zero for now, known to all ranks of a shard group.

A compression method says so when its mask changes: AC/DC once a phase, CrAM once a step, for its
pass with compressed weights. Then all ranks exchange their masks, one bit a weight, in a single
collective a process group; from it every rank knows what every payload will hold, and how long it
will be, until the next change. Payloads carry the codes of the support alone, of gradients too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.comm import transport
from qsdp.comm.group_plan import Plan
from qsdp.comm.pruned_slices import SliceMasks
from qsdp.comm.wire_state import Wire
from qsdp.common import bitmask
from qsdp.common.collective_errors import collective


def exchange(
    plans: Sequence[Plan],
    masks: Sequence[Mapping[int, Tensor]],
    wire: Wire,
    *,
    with_grads: bool,
) -> None:
    """Exchange the sparse support: tell all ranks, and the plans, which weights are kept.

    Args:
        plans: Those of all groups of the model.
        masks: The bool mask of this rank's shard by plan and place; the same places on all ranks.
        wire: With the counters and the step.
        with_grads: Gradients of pruned weights are left out too.
    """
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for i, plan in enumerate(plans):
        plan.set_support({})
        if masks[i] and plan.world_size > 1:
            groups.setdefault(plan.group, []).append(i)
    for group, members in groups.items():
        sizes, own = [], []
        for i in members:
            for place, mask in sorted(masks[i].items()):
                padded = plans[i].parameters[place].padded_numel(group.size())
                flat = mask.reshape(-1)
                own.append(bitmask.pack(torch.nn.functional.pad(flat, (0, padded - flat.numel()))))
                sizes.append(own[-1].numel())
        mine = torch.cat(own)
        everyone = mine.new_empty(group.size() * mine.numel())
        with (
            collective("exchange of masks", plans[members[0]].names, wire.clock.step),
            wire.times.measure("gather", "wire", mine.device),
        ):
            transport.start_all_gather(everyone, mine, group).wait()
        wire.traffic.gathered("gather", group, mine.numel())
        bits = everyone.view(group.size(), -1)
        # On a GPU the host waits here, once, and not at every layout that is made of the masks.
        counts = torch.stack([bitmask.count(part) for part in bits.split(sizes, dim=1)]).tolist()
        starts = accumulate([0, *sizes[:-1]])
        by_parameter = iter([SliceMasks(bits, *each) for each in zip(starts, counts, strict=True)])
        for i in members:
            of_plan = {place: next(by_parameter) for place in sorted(masks[i])}
            plans[i].set_support(of_plan, with_grads=with_grads)
