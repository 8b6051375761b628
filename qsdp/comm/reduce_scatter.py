"""The quantized reduce-scatter of gradients."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import Status
from qsdp.comm import transport
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.headers import check_headers
from qsdp.comm.key_clock import ACROSS, FLAT, LOCAL
from qsdp.comm.late_reduce import SetsDiffer
from qsdp.comm.transport import as_bytes
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import collective


class Hop(NamedTuple):
    """One all-to-all of a reduce."""

    layout: GroupLayout
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
        layout = plan.reduce(with_grad, dtype, least)
        return [Hop(layout, FLAT, group, tuple((rank,) for rank in ranks))]
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
    layout, status = hops[0].layout, Status.KEPT
    # Rows are without what is pruned at their owner from here to the end.
    rows = {
        rank: layout.compact(rank, row, wire.buffers, f"row {rank}")
        for rank, row in enumerate(input.chunk(plan.world_size))
    }
    del input
    for hop in hops:
        is_last = hop is hops[-1] and output.dtype == torch.float32
        into = output if is_last and not layout.is_sparse else None
        keeps = is_late and len(hops) == 1  # else only sums are needed when the last hop stops
        status = yield from _take(plan, hop, rows, occurrence, wire, slot, into, status, keeps)
    if status != Status.KEPT:
        raise SetsDiffer
    layout.expand(plan.rank, rows[plan.rank], output)
    wire.traffic.in_fp32("reduce", plan.world_size, hops[-1].layout.num_values)
    return occurrence


def _take(
    plan: Plan,
    hop: Hop,
    rows: dict[int, Tensor],
    occurrence: int,
    wire: Wire,
    slot: int,
    output: Tensor | None,
    status: Status,
    keeps: bool,
) -> Generator[None, None, Status]:
    """Take one hop: the rows that this rank owns, which alone are left of ``rows``, become fp32
    sums over the hop's group.

    1. Encode the rows of every other rank: unbiased, each with a key of its own.
    2. One all-to-all of payloads; nothing is sent to oneself.
    3. Check every header.
    4. Add the rows in fp32 in rank order, the only one into ``output`` if it is given. This rank's
       own rows never cross the wire and are added as they are; no sum is quantized again.

    Returns this rank's status after what it heard; sums are valid until the next reduce of this
    ``slot``. ``keeps``: copy this rank's own rows before the first stop.
    """
    layout, number, group, owned = hop
    me, mine = group.rank(), owned[group.rank()]
    if group.size() == 1:
        for row in mine:
            rows[row] = rows[row].float()
        return status
    device = rows[mine[0]].device
    size, width, step = layout.payload_bytes, len(mine), wire.clock.step
    levels = wire.level_values
    peers = [rank for rank in range(group.size()) if rank != me]
    global_ranks = dist.get_process_group_ranks(group)

    def take(purpose: str, num_bytes: int) -> Tensor:
        return wire.buffers.take(f"{purpose} {slot}", num_bytes, device)

    def key(sender: int, row: int) -> int:
        return wire.clock.reduce_key(number, occurrence, global_ranks[sender], row)

    sent = take("send", len(peers) * width * size)
    received = take("receive", len(peers) * width * size)
    header = layout.header(global_ranks[me], step, status)
    to_send = [row for peer in peers for row in owned[peer]]
    with wire.times.measure("reduce", "encode", device):
        for row, payload in zip(to_send, sent.split(size), strict=True):
            values, table = as_bytes(rows[row]), layout.tables[row]
            ops.encode(values, table, key(me, row), header, payload, levels)
    for row in to_send:
        wire.observe(layout.tables[row], rows[row])

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
    status = check_headers(seen, layout, senders, step, plan, status)

    numels = [rows[row].numel() for row in mine]
    memory = take(f"sums {number}", 4 * sum(numels) if output is None else 0)
    sums = list(memory.view(torch.float32).split(numels)) if output is None else [output]
    payloads = received.split(size)
    with wire.times.measure("reduce", "decode", device):
        for i, (total, row) in enumerate(zip(sums, mine, strict=True)):
            table = layout.fp32_tables[row]
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
    return status
