"""The quantized reduce-scatter of gradients."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import Status
from qsdp.codec.random_numbers import Stage
from qsdp.comm import transport
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.headers import check_headers
from qsdp.comm.late_reduce import SetsDiffer
from qsdp.comm.transport import as_bytes
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import collective


class Exchange(NamedTuple):
    """One all-to-all of a reduce."""

    layout: GroupLayout
    stage: Stage
    group: dist.ProcessGroup
    owned: tuple[tuple[int, ...], ...]
    """By rank of the group: the rows, of all the shard group's, that it ends with."""


def exchanges_of(
    plan: Plan,
    with_grad: tuple[int, ...],
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    wire: Wire,
) -> list[Exchange]:
    """The exchanges of a reduce of the parameters at places ``with_grad``, in ``dtype``.

    One a stage of the plan ([Note: Stages]), that of all ranks over ``group``. After the first,
    fp32 sums are sent. Over nodes, what crosses their boundaries is 1 / ranks-per-node of the flat
    form.
    """
    exchanges, rows = [], tuple(range(plan.world_size))
    for each in plan.stages:
        layout = plan.reduce(with_grad, dtype, wire.least_bits, each.is_in_node)
        over = group if each.group is plan.group else each.group
        owned = tuple(rows[place :: each.size] for place in range(each.size))
        exchanges.append(Exchange(layout, each.stage, over, owned))
        rows, dtype = owned[over.rank()], torch.float32
    return exchanges


def reduce(
    plan: Plan,
    exchanges: list[Exchange],
    output: Tensor,
    input: Tensor,
    wire: Wire,
    slot: int,
    *,
    is_late: bool,
) -> Generator[None, None, int]:
    """Sum ``input`` [world * shard] over ranks, this rank's row into ``output`` [shard].

    A generator that stops once an exchange, where the payloads are on the wire and, on CPUs, this
    thread can do something else. All that its keys and codec depend on is bound before its stop.

    Args:
        plan: of the group.
        exchanges: see `exchanges_of`.
        output, input: of one dtype.
        wire: with the step, counters and buffers.
        slot: of the buffers, which no other reduce may use meanwhile.
        is_late: ``input`` is not needed after the last stop: what is left of it is copied.

    Returns how many reduces the group had before in this step. Raises RuntimeError when a header is
    not what this rank expects, SetsDiffer when another rank has other parameters to reduce.
    """
    occurrence = wire.clock.before_reduce(plan.index)
    layout, status = exchanges[0].layout, Status.KEPT
    # Rows are without what is pruned at their owner from here to the end.
    rows = {
        rank: layout.compact(rank, row, wire.buffers, f"row {rank}")
        for rank, row in enumerate(input.chunk(plan.world_size))
    }
    del input
    for exchange in exchanges:
        is_last = exchange is exchanges[-1] and output.dtype == torch.float32
        into = output if is_last and not layout.is_sparse else None
        keeps = is_late and len(exchanges) == 1  # else only sums are needed at the last stop
        status = yield from _take(plan, exchange, rows, occurrence, wire, slot, into, status, keeps)
    if status != Status.KEPT:
        raise SetsDiffer
    layout.expand(plan.rank, rows[plan.rank], output)
    wire.traffic.in_fp32("reduce", plan.world_size, exchanges[-1].layout.num_values)
    return occurrence


def _take(
    plan: Plan,
    exchange: Exchange,
    rows: dict[int, Tensor],
    occurrence: int,
    wire: Wire,
    slot: int,
    output: Tensor | None,
    status: Status,
    keeps: bool,
) -> Generator[None, None, Status]:
    """Take one exchange: the rows that this rank owns, which alone are left of ``rows``, become
    fp32 sums over its group.

    1. Encode the rows of every other rank: unbiased, each with a key of its own.
    2. One all-to-all of payloads; nothing is sent to oneself.
    3. Check every header.
    4. Add the rows in fp32 in rank order, the only one into ``output`` if it is given. This rank's
       own rows never cross the wire and are added as they are; no sum is quantized again.

    Returns this rank's status after what it heard; sums are valid until the next reduce of this
    ``slot``. ``keeps``: copy this rank's own rows before the first stop.
    """
    layout, stage, group, owned = exchange
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
        return wire.clock.reduce_key(stage, occurrence, global_ranks[sender], row)

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
    memory = take(f"sums {stage.name}", 4 * sum(numels) if output is None else 0)
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
