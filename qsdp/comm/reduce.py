"""The quantized reduce-scatter of gradients."""

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.codec.payload import Standing
from qsdp.comm.clock import Clock
from qsdp.comm.failures import collective
from qsdp.comm.gather import as_bytes, check_headers
from qsdp.comm.plan import Plan, Side
from qsdp.comm.scratch import Scratch
from qsdp.comm.traffic import Traffic


class SetsDiffer(Exception):
    """Some ranks have the agreed gradients to reduce, and some have others: [Note: Consent]."""


def reduce(
    plan: Plan,
    side: Side,
    output: Tensor,
    input: Tensor,
    group: dist.ProcessGroup,
    clock: Clock,
    traffic: Traffic,
    scratch: Scratch,
) -> None:
    """Sum ``input`` [world * shard] over ranks, this rank's row into ``output`` [shard].

    ``group`` has the ranks of the plan's group, and may be it: FSDP2 can keep a process group apart
    for reduces, so that they overlap with gathers.

    1. Encode the row of every other rank: unbiased, with a key of its own.
    2. One all-to-all of payloads; nothing is sent to oneself.
    3. Check every header.
    4. Add the rows in fp32 in rank order. This rank's own row never crosses the wire and is added
       as it is; no sum is quantized again.

    Raises RuntimeError when a header is not what this rank expects, SetsDiffer when another rank
    has other parameters to reduce.
    """
    size, world_size = side.layout.payload_bytes, plan.world_size
    peers = [rank for rank in range(world_size) if rank != plan.rank]
    sent = scratch.take("send", len(peers) * size, input.device)
    received = scratch.take("receive", len(peers) * size, input.device)
    me = plan.global_ranks[plan.rank]
    occurrence = clock.before_reduce(plan.index)
    header = side.layout.header(me, clock.step)
    rows = input.chunk(world_size)
    for peer, payload in zip(peers, sent.split(size), strict=True):
        key = clock.reduce_key(occurrence, me, peer)
        torch.ops.qsdp.encode(as_bytes(rows[peer]), side.tables[peer], key, header, payload)

    splits = [size if rank != plan.rank else 0 for rank in range(world_size)]
    with collective("reduce", plan.names, clock.step):
        dist.all_to_all_single(received, sent, splits, splits, group=group)
    traffic.sent("reduce", group, size, side.layout.num_values)
    senders = [plan.global_ranks[peer] for peer in peers]
    if check_headers(received, side, senders, clock.step, plan) != Standing.KEPT:
        raise SetsDiffer

    total = output
    if output.dtype != torch.float32:
        total_bytes = scratch.take("total", 4 * output.numel(), output.device)
        total = total_bytes.view(torch.float32)
    payloads = iter(received.split(size))
    table = side.fp32_tables[plan.rank]
    for rank in range(world_size):
        if rank != plan.rank:
            key = clock.reduce_key(occurrence, plan.global_ranks[rank], plan.rank)
            torch.ops.qsdp.decode(next(payloads), table, key, as_bytes(total), rank > 0)
        elif rank == 0:
            total.copy_(rows[plan.rank])
        else:
            total.add_(rows[plan.rank])
    if total is not output:
        output.copy_(total)
