"""The quantized reduce-scatter of gradients, and the all-reduce between replicas."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import compat
from qsdp.comm.clock import ACROSS, FLAT, LOCAL, REPLICAS
from qsdp.comm.gather import as_bytes, check_headers
from qsdp.comm.plan import Plan, Side
from qsdp.comm.wire import Wire


def reduce(
    plan: Plan,
    with_grad: tuple[int, ...],
    output: Tensor,
    input: Tensor,
    group: dist.ProcessGroup,
    wire: Wire,
) -> int:
    """Sum ``input`` [world * shard] over ranks, this rank's row into ``output`` [shard].

    ``with_grad`` are the places of the parameters in the buffer. ``group`` has the ranks of the
    plan's group, and may be it: FSDP2 can keep a process group apart for reduces, so that they
    overlap with gathers.

    Flat, it is one hop over all ranks. In two hops, the ranks of a node first add what they have
    for each node's rank of their own place, then the nodes add these sums: what crosses a node's
    boundary is 1 / ranks-per-node of the flat form. See `_hop`.

    Returns how many reduces the group had before in this step. Raises RuntimeError when a header is
    not what this rank expects.
    """
    dtype, least = input.dtype, wire.least_bits
    side = plan.reduce(with_grad, dtype, least)
    occurrence = wire.clock.before_reduce(plan.index)
    rows = list(input.chunk(plan.world_size))
    ranks, me = list(range(plan.world_size)), plan.rank
    if plan.hops is None:
        peers = [[rank] for rank in ranks]
        (total,) = _hop(plan, side, peers, rows, group, FLAT, occurrence, wire, output)
    else:
        width = plan.hops.ranks_per_node
        places = [ranks[place::width] for place in range(width)]
        local = plan.reduce(with_grad, dtype, least, is_local=True)
        sums = _hop(plan, local, places, rows, plan.hops.local, LOCAL, occurrence, wire)
        for rank, part in zip(places[me % width], sums, strict=True):
            rows[rank] = part
        side = plan.reduce(with_grad, torch.float32, least)
        nodes = [[rank] for rank in places[me % width]]
        across = plan.hops.across
        (total,) = _hop(plan, side, nodes, rows, across, ACROSS, occurrence, wire, output)
    if total is not output:
        output.copy_(total)
    wire.traffic.in_fp32("reduce", plan.world_size - 1, side.layout.num_values)
    return occurrence


def _hop(
    plan: Plan,
    side: Side,
    owned: Sequence[Sequence[int]],
    rows: Sequence[Tensor],
    group: dist.ProcessGroup,
    hop: int,
    occurrence: int,
    wire: Wire,
    output: Tensor | None = None,
) -> list[Tensor]:
    """Sum rows over ``group``; ``owned[i]`` are those that rank i of it ends with.

    1. Encode the rows of every other rank: unbiased, each with a key of its own.
    2. One all-to-all of payloads; nothing is sent to oneself.
    3. Check every header.
    4. Add the rows in fp32 in rank order. This rank's own rows never cross the wire and are added
       as they are; no sum is quantized again within the hop.

    Returns fp32 sums of the rows that this rank owns, in their order, the only one in ``output`` if
    that is fp32; valid until the next hop of this kind.
    """
    device, me = rows[0].device, group.rank()
    mine = owned[me]
    if group.size() == 1:
        return [rows[rank].float() for rank in mine]
    size, width = side.layout.payload_bytes, len(mine)
    peers = [rank for rank in range(group.size()) if rank != me]
    sent = wire.scratch.take("send", len(peers) * width * size, device)
    received = wire.scratch.take("receive", len(peers) * width * size, device)
    global_ranks = dist.get_process_group_ranks(group)
    sender, clock = global_ranks[me], wire.clock
    header = side.layout.header(sender, clock.step)
    to_send = [row for peer in peers for row in owned[peer]]
    with wire.times.measure("reduce", "encode", device):
        for row, payload in zip(to_send, sent.split(size), strict=True):
            key = clock.reduce_key(hop, occurrence, sender, row)
            torch.ops.qsdp.encode(as_bytes(rows[row]), side.tables[row], key, header, payload)
    for meter in wire.meters:
        for row in to_send:
            meter.add(side.tables[row], rows[row], is_grad=True)

    splits = [width * size if rank != me else 0 for rank in range(group.size())]
    with wire.times.measure("reduce", "wire", device):
        dist.all_to_all_single(received, sent, splits, splits, group=group)
    wire.traffic.sent("reduce", [global_ranks[peer] for peer in peers], width * size)
    senders = [global_ranks[peer] for peer in peers for _ in range(width)]
    check_headers(received, side, senders, clock.step, plan)

    numel = rows[0].numel()
    if output is not None and output.dtype == torch.float32:
        sums = [output]
    else:
        memory = wire.scratch.take(f"sums {hop}", 4 * width * numel, device)
        sums = list(memory.view(torch.float32).view(width, numel))
    payloads = received.split(size)
    with wire.times.measure("reduce", "decode", device):
        for i, (total, row) in enumerate(zip(sums, mine, strict=True)):
            table = side.fp32_tables[row]
            for rank in range(group.size()):
                if rank != me:
                    payload = payloads[peers.index(rank) * width + i]
                    key = clock.reduce_key(hop, occurrence, global_ranks[rank], row)
                    torch.ops.qsdp.decode(payload, table, key, as_bytes(total), rank > 0)
                elif rank == 0:
                    total.copy_(rows[row])
                else:
                    total.add_(rows[row])
    return sums


def all_reduce(
    plan: Plan,
    with_grad: tuple[int, ...],
    tensor: Tensor,
    group: dist.ProcessGroup,
    occurrence: int,
    wire: Wire,
) -> None:
    """Average ``tensor`` [shard], a reduced row, over the replicas in ``group``, in place.

    Every replica sends its row to all others as one payload, quantized once. All rows, the own one
    too, are decoded and added in fp32 in replica order, so that replicas stay bit-identical. For R
    replicas it takes R - 1 payloads a rank: the least for two, more than a reduce-scatter and an
    all-gather (2 (R - 1) / R, quantized twice) for many.
    """
    side = plan.reduce(with_grad, tensor.dtype, wire.least_bits)
    size, clock, device = side.layout.payload_bytes, wire.clock, tensor.device
    ranks = dist.get_process_group_ranks(group)
    payloads = wire.scratch.take("receive", group.size() * size, device)
    own = payloads.narrow(0, group.rank() * size, size)
    keys = [clock.reduce_key(REPLICAS, occurrence, rank, plan.rank) for rank in ranks]
    header = side.layout.header(ranks[group.rank()], clock.step)
    table, fp32_table = side.tables[plan.rank], side.fp32_tables[plan.rank]
    with wire.times.measure("reduce", "encode", device):
        torch.ops.qsdp.encode(as_bytes(tensor), table, keys[group.rank()], header, own)
    for meter in wire.meters:
        meter.add(table, tensor, is_grad=True)
    with wire.times.measure("reduce", "wire", device):
        compat.all_gather(payloads, own, group)
    wire.traffic.gathered("reduce", group, size)
    check_headers(payloads, side, ranks, clock.step, plan)
    total_bytes = wire.scratch.take("sums", 4 * tensor.numel(), device)
    total = total_bytes.view(torch.float32)
    with wire.times.measure("reduce", "decode", device):
        for place, (payload, key) in enumerate(zip(payloads.split(size), keys, strict=True)):
            torch.ops.qsdp.decode(payload, fp32_table, key, as_bytes(total), place > 0)
    tensor.copy_(total.div_(group.size()))
