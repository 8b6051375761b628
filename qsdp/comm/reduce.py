"""The quantized reduce-scatter of gradients, and the all-reduce between replicas."""

from collections.abc import Generator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import Standing
from qsdp.comm import transport
from qsdp.comm.clock import ACROSS, FLAT, LOCAL, REPLICAS
from qsdp.comm.gather import as_bytes, check_headers
from qsdp.comm.late import SetsDiffer
from qsdp.comm.plan import Plan
from qsdp.comm.side import Side
from qsdp.comm.wire import Wire
from qsdp.common.failures import collective


class Hop(NamedTuple):
    """One all-to-all of a reduce."""

    side: Side
    number: int
    """FLAT, LOCAL or ACROSS: a word of the key."""
    group: dist.ProcessGroup
    owned: tuple[tuple[int, ...], ...]
    """By rank of the group: the rows, of all the shard group's, that it ends with."""


def hops_of(
    plan: Plan,
    with_grad: tuple[int, ...],
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    wire: Wire,
) -> list[Hop]:
    """The hops of a reduce of the parameters at places ``with_grad``, in ``dtype``.

    Flat, it is one over all ranks of ``group``. In two hops, the ranks of a node first add what
    they have for each node's rank of their own place, then the nodes add these fp32 sums: what
    crosses a node's boundary is 1 / ranks-per-node of the flat form.
    """
    least, ranks = wire.least_bits, tuple(range(plan.world_size))
    if plan.hops is None:
        side = plan.reduce(with_grad, dtype, least)
        return [Hop(side, FLAT, group, tuple((rank,) for rank in ranks))]
    width = plan.hops.ranks_per_node
    places = tuple(ranks[place::width] for place in range(width))
    nodes = tuple((rank,) for rank in places[plan.rank % width])
    return [
        Hop(plan.reduce(with_grad, dtype, least, True), LOCAL, plan.hops.local, places),
        Hop(plan.reduce(with_grad, torch.float32, least), ACROSS, plan.hops.across, nodes),
    ]


def reduce(
    plan: Plan,
    hops: list[Hop],
    output: Tensor,
    input: Tensor,
    wire: Wire,
    slot: int,
    *,
    is_late: bool,
) -> Generator[None, None, int]:
    """Sum ``input`` [world * shard] over ranks, this rank's row into ``output`` [shard].

    A generator that stops once a hop, where the payloads are on the wire and, on CPUs, this thread
    can do something else. All that a hop's keys and codec depend on is bound before its stop.

    Args:
        plan: of the group.
        hops: see `hops_of`.
        output, input: of one dtype.
        wire: with the step, counters and buffers.
        slot: of the buffers, which no other reduce may use meanwhile.
        is_late: ``input`` is not needed after the last stop: what is left of it is copied.

    Returns how many reduces the group had before in this step. Raises RuntimeError when a header is
    not what this rank expects, SetsDiffer when another rank has other parameters to reduce.
    """
    occurrence = wire.clock.before_reduce(plan.index)
    side, standing = hops[0].side, Standing.KEPT
    # Rows are without what is pruned at their owner from here to the end.
    rows = {
        rank: side.compact(rank, row, wire.scratch, f"row {rank}")
        for rank, row in enumerate(input.chunk(plan.world_size))
    }
    del input
    for hop in hops:
        is_last = hop is hops[-1] and output.dtype == torch.float32
        into = output if is_last and not side.is_sparse else None
        keeps = is_late and len(hops) == 1  # else only sums are needed when the last hop stops
        standing = yield from _take(plan, hop, rows, occurrence, wire, slot, into, standing, keeps)
    if standing != Standing.KEPT:
        raise SetsDiffer
    side.expand(plan.rank, rows[plan.rank], output)
    wire.traffic.in_fp32("reduce", plan.world_size, hops[-1].side.num_values)
    return occurrence


def _take(
    plan: Plan,
    hop: Hop,
    rows: dict[int, Tensor],
    occurrence: int,
    wire: Wire,
    slot: int,
    output: Tensor | None,
    standing: Standing,
    keeps: bool,
) -> Generator[None, None, Standing]:
    """Take one hop: the rows that this rank owns, which alone are left of ``rows``, become fp32
    sums over the hop's group.

    1. Encode the rows of every other rank: unbiased, each with a key of its own.
    2. One all-to-all of payloads; nothing is sent to oneself.
    3. Check every header.
    4. Add the rows in fp32 in rank order, the only one into ``output`` if it is given. This rank's
       own rows never cross the wire and are added as they are; no sum is quantized again.

    Returns this rank's standing after what it heard; sums are valid until the next reduce of this
    ``slot``. ``keeps``: copy this rank's own rows before the first stop.
    """
    side, number, group, owned = hop
    me, mine = group.rank(), owned[group.rank()]
    if group.size() == 1:
        for row in mine:
            rows[row] = rows[row].float()
        return standing
    device = rows[mine[0]].device
    size, width, step = side.payload_bytes, len(mine), wire.clock.step
    levels = wire.level_values
    peers = [rank for rank in range(group.size()) if rank != me]
    global_ranks = dist.get_process_group_ranks(group)

    def take(purpose: str, num_bytes: int) -> Tensor:
        return wire.scratch.take(f"{purpose} {slot}", num_bytes, device)

    def key(sender: int, row: int) -> int:
        return wire.clock.reduce_key(number, occurrence, global_ranks[sender], row)

    sent = take("send", len(peers) * width * size)
    received = take("receive", len(peers) * width * size)
    header = side.header(global_ranks[me], step, standing)
    to_send = [row for peer in peers for row in owned[peer]]
    with wire.times.measure("reduce", "encode", device):
        for row, payload in zip(to_send, sent.split(size), strict=True):
            ops.encode(as_bytes(rows[row]), side.tables[row], key(me, row), header, payload, levels)
    for row in to_send:
        wire.observe(side.tables[row], rows[row])

    splits = [width * size if rank != me else 0 for rank in range(group.size())]
    with collective("reduce", plan.names, step), wire.times.measure("reduce", "wire", device):
        arrival = transport.all_to_all(received, sent, splits, splits, group)
    for row in [*rows]:
        if row not in mine:
            del rows[row]
        elif keeps:
            own = take(f"own row {row}", rows[row].nbytes)
            rows[row] = own.view(rows[row].dtype).copy_(rows[row])
    keys = {(peer, row): key(peer, row) for peer in peers for row in mine}
    yield
    with collective("reduce", plan.names, step), wire.times.measure("reduce", "wire", device):
        seen = arrival.wait()
    wire.traffic.sent("reduce", [global_ranks[peer] for peer in peers], width * size)
    senders = [global_ranks[peer] for peer in peers for _ in range(width)]
    standing = check_headers(seen, side, senders, step, plan, standing)

    numels = [rows[row].numel() for row in mine]
    memory = take(f"sums {number}", 4 * sum(numels) if output is None else 0)
    sums = list(memory.view(torch.float32).split(numels)) if output is None else [output]
    payloads = received.split(size)
    with wire.times.measure("reduce", "decode", device):
        for i, (total, row) in enumerate(zip(sums, mine, strict=True)):
            table = side.fp32_tables[row]
            for rank in range(group.size()):
                if rank != me:
                    payload = payloads[peers.index(rank) * width + i]
                    into, own_key = as_bytes(total), keys[rank, row]
                    ops.decode(payload, table, own_key, into, rank > 0, levels)
                elif rank == 0:
                    total.copy_(rows[row])
                else:
                    total.add_(rows[row])
            rows[row] = total
    return standing


def all_reduce(
    plan: Plan,
    with_grad: tuple[int, ...],
    tensor: Tensor,
    group: dist.ProcessGroup,
    occurrence: int,
    wire: Wire,
    divisor: int,
) -> None:
    """Sum ``tensor`` [shard], a reduced row, over the replicas in ``group`` and divide it by
    ``divisor``, in place.

    Every replica sends its row to all others as one payload, quantized once. All rows, the own one
    too, are decoded and added in fp32 in replica order, so that replicas stay bit-identical. For R
    replicas it takes R - 1 payloads a rank: the least for two, more than a reduce-scatter and an
    all-gather (2 (R - 1) / R, quantized twice) for many.

    Raises SetsDiffer when a replica has other parameters to reduce.
    """
    side = plan.reduce(with_grad, tensor.dtype, wire.least_bits)
    size, clock, device = side.payload_bytes, wire.clock, tensor.device
    values = side.compact(plan.rank, tensor, wire.scratch, "compact")
    levels = wire.level_values
    ranks = dist.get_process_group_ranks(group)
    payloads = wire.scratch.take("receive", group.size() * size, device)
    own = payloads.narrow(0, group.rank() * size, size)
    keys = [clock.reduce_key(REPLICAS, occurrence, rank, plan.rank) for rank in ranks]
    header = side.header(ranks[group.rank()], clock.step)
    table, fp32_table = side.tables[plan.rank], side.fp32_tables[plan.rank]
    with wire.times.measure("reduce", "encode", device):
        ops.encode(as_bytes(values), table, keys[group.rank()], header, own, levels)
    wire.observe(table, values)
    with (
        collective("all-reduce between replicas", plan.names, clock.step),
        wire.times.measure("reduce", "wire", device),
    ):
        seen = transport.all_gather(payloads, own, group).wait()
    wire.traffic.gathered("reduce", group, size)
    # In fp32 it would be a reduce-scatter and an all-gather.
    wire.traffic.in_fp32("reduce", group.size(), 2 * side.num_values // plan.world_size)
    if check_headers(seen, side, ranks, clock.step, plan) != Standing.KEPT:
        raise SetsDiffer
    total_bytes = wire.scratch.take("sums", 4 * values.numel(), device)
    total = total_bytes.view(torch.float32)
    with wire.times.measure("reduce", "decode", device):
        for place, (payload, key) in enumerate(zip(payloads.split(size), keys, strict=True)):
            ops.decode(payload, fp32_table, key, as_bytes(total), place > 0, levels)
    side.expand(plan.rank, total.div_(divisor), tensor)
