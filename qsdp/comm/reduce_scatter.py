"""The quantized reduce-scatter of gradients."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import PayloadStatus
from qsdp.codec.random_numbers import KeyStage
from qsdp.comm import transport
from qsdp.comm.buffers import as_bytes
from qsdp.comm.differing_gradients import GradientsDiffer
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.headers import check_headers
from qsdp.comm.routes import received_route, sent_route
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import collective


class Exchange(NamedTuple):
    """One exchange of a reduce-scatter: an all-to-all of a stage."""

    layout: GroupLayout
    stage: KeyStage
    group: dist.ProcessGroup
    owned: tuple[tuple[int, ...], ...]
    """The rows, of all the shard group's, that each rank of the group ends with."""


def reduce_exchanges(
    plan: Plan,
    with_grad: tuple[int, ...],
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    wire: Wire,
) -> list[Exchange]:
    """The exchanges of a reduce-scatter of the parameters at places ``with_grad``, in ``dtype``.

    There is one for each stage of the plan ([Note: Stages]); that of all ranks is over ``group``.
    After the first, fp32 sums are sent. Over nodes, what crosses their boundaries is 1 /
    ranks-per-node of the flat form.
    """
    exchanges, rows = [], tuple(range(plan.world_size))
    for each in plan.stages:
        layout = plan.reduce(with_grad, dtype, wire.least_bits, each.is_in_node)
        over, size = group if each.group is plan.group else each.group, each.size
        owned = tuple(rows[place::size] for place in range(size))
        exchanges.append(Exchange(layout, each.stage, over, owned))
        rows, dtype = owned[over.rank()], torch.float32
    return exchanges


@dataclass
class _Rows:
    """What this rank has of the sums so far: a row for each rank that they are to go to."""

    values: Tensor
    """[rows, values], without what is pruned at the owners."""
    owners: tuple[int, ...]
    """Ranks of the shard group."""


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
    """The reduce-scatter: sum ``input`` [world * shard], this rank's row into ``output`` [shard].

    A generator that stops once an exchange, where the payloads are on the wire and, on CPUs, this
    thread can do something else. All that its keys and codec depend on is bound before its stop.

    Args:
        plan: How the group travels.
        exchanges: See ``reduce_exchanges``.
        output, input: Of one dtype. Gradients of ``input`` that are rotated are so in place.
        wire: With the step, counters and buffers.
        slot: A slot of buffers that no other reduce may use meanwhile.
        is_late: ``input`` is not needed after the last stop: what is left of it is copied.

    Returns:
        How many reduces the group had before in this step.

    Raises:
        RuntimeError: A header is not what this rank expects.
        GradientsDiffer: Another rank has other parameters to reduce.
    """
    occurrence = wire.clock.before_reduce(plan.index)
    layout, status = exchanges[0].layout, PayloadStatus.KEPT
    values = layout.compact(input.view(plan.world_size, output.numel()), wire.buffers)
    layout.rotate(values)
    rows = _Rows(values, tuple(range(plan.world_size)))
    del input, values
    for exchange in exchanges:
        is_last = exchange is exchanges[-1] and output.dtype == torch.float32
        into = output if is_last and layout.pruned is None else None
        keeps = is_late and len(exchanges) == 1  # else only sums are needed at the last stop
        status = yield from _take(plan, exchange, rows, occurrence, wire, slot, into, status, keeps)
    if status != PayloadStatus.KEPT:
        raise GradientsDiffer
    layout.rotate(rows.values, plan.rank)
    layout.expand(plan.rank, rows.values[0], output)
    wire.traffic.in_fp32("reduce", plan.world_size, exchanges[-1].layout.num_values)
    return occurrence


def _take(
    plan: Plan,
    exchange: Exchange,
    rows: _Rows,
    occurrence: int,
    wire: Wire,
    slot: int,
    output: Tensor | None,
    status: PayloadStatus,
    keeps: bool,
) -> Generator[None, None, PayloadStatus]:
    """Take one exchange: what is left are ``rows`` of this rank, fp32 sums over its group.

    1. Encode the rows of every other rank: unbiased, each with a key of its own.
    2. One all-to-all of payloads; nothing is sent to oneself.
    3. Check every header.
    4. Add the rows in fp32 in rank order, the only one into ``output`` if it is given. This rank's
       own rows never cross the wire and are added as they are; no sum is quantized again.

    ``keeps``: copy this rank's own rows before the first stop.

    Returns this rank's status after what it heard. The sums are valid until the next reduce of this
    ``slot``.
    """
    layout, stage, group, owned = exchange
    me, num_ranks = group.rank(), group.size()
    if num_ranks == 1:
        rows.values = rows.values.float()
        return status
    values, device = rows.values, rows.values.device
    size, width, step = layout.payload_bytes, len(owned[me]), wire.clock.step
    levels = wire.level_values
    global_ranks = tuple(dist.get_process_group_ranks(group))

    def take(purpose: str, num_bytes: int) -> Tensor:
        return wire.buffers.take(f"{purpose} {slot}", num_bytes, device)

    to_send = sent_route(rows.owners, me, global_ranks)
    num_bytes = len(to_send.payloads) * size
    outgoing, incoming = take("send", num_bytes), take("receive", num_bytes)
    header = layout.header(global_ranks[me], step, status)
    parts = layout.parts(to_send, wire.clock.reduce_keys(stage, occurrence, to_send))
    with wire.times.measure("reduce", "encode", device):
        given, payloads = values.view(torch.uint8), outgoing.view(-1, size)
        ops.encode_all(given, layout.tables, parts, header, payloads, levels)
    for row in to_send.buffers.tolist() if wire.meters else ():
        wire.observe(layout.table(rows.owners[row]), values[row])

    splits = [width * size if rank != me else 0 for rank in range(num_ranks)]
    with collective("reduce", plan.names, step), wire.times.measure("reduce", "wire", device):
        arrival = transport.start_all_to_all(incoming, outgoing, splits, splits, group)
    own = values[me::num_ranks]
    if keeps or layout.pruned is not None:  # a pruned row lies among those that were sent
        own = take("own rows", own.nbytes).view(own.dtype).view_as(own).copy_(own)
    rows.values, rows.owners = own, owned[me]
    del values, given, own
    to_add = received_route(owned[me], me, global_ranks)
    parts = layout.parts(to_add, wire.clock.reduce_keys(stage, occurrence, to_add))
    yield
    with collective("reduce", plan.names, step), wire.times.measure("reduce", "wire", device):
        seen = arrival.wait()
    senders = to_add.senders.tolist()
    wire.traffic.sent("reduce", senders[::width], width * size)
    status = check_headers(seen, layout, senders, step, plan, status)

    shape = rows.values.shape
    memory = take(f"sums {stage.name}", 4 * shape.numel()) if output is None else as_bytes(output)
    sums = memory.view(torch.float32).view(shape)
    payloads = incoming.view(-1, size)
    with wire.times.measure("reduce", "decode", device):
        for some, is_before in ((parts[: me * width], True), (parts[me * width :], False)):
            ops.decode_all(payloads, layout.fp32_tables, some, sums.view(torch.uint8), levels)
            if is_before and me == 0:
                sums.copy_(rows.values)
            elif is_before:
                sums.add_(rows.values)
    rows.values = sums
    return status
