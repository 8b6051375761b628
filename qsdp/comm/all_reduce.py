"""The quantized all-reduce of gradients between replicas."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import PayloadStatus
from qsdp.codec.random_numbers import KeyStage
from qsdp.comm import transport
from qsdp.comm.buffers import as_bytes
from qsdp.comm.differing_gradients import GradientsDiffer
from qsdp.comm.group_plan import Plan
from qsdp.comm.headers import check_headers
from qsdp.comm.routes import average_route
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import collective


def all_reduce(
    plan: Plan,
    with_grad: tuple[int, ...],
    tensor: Tensor,
    group: dist.ProcessGroup,
    occurrence: int,
    wire: Wire,
    divisor: int,
) -> None:
    """Average ``tensor`` [shard], a reduced row, over the replicas in ``group``, in place.

    The sum is divided by ``divisor``. Every replica sends its row to all others as one payload,
    quantized once. All rows, the own one too, are decoded and added in fp32 in replica order, so
    that replicas stay bit-identical. For R replicas it takes R - 1 payloads a rank: the least for
    two, more than a reduce-scatter and an all-gather (2 (R - 1) / R, quantized twice) for many.

    Raises GradientsDiffer when a replica has other parameters to reduce.
    """
    layout = plan.reduce(with_grad, tensor.dtype, wire.least_bits)
    size, clock, device = layout.payload_bytes, wire.clock, tensor.device
    values = layout.compact(tensor.view(1, -1), wire.buffers, plan.rank)[0]
    layout.rotate(values[None], plan.rank)
    levels = wire.level_values
    ranks = dist.get_process_group_ranks(group)
    payloads = wire.buffers.take("receive", group.size() * size, device)
    own = payloads.narrow(0, group.rank() * size, size)
    route = average_route(plan.rank, tuple(ranks))
    keys = clock.reduce_keys(KeyStage.REPLICAS, occurrence, route)
    header = layout.header(ranks[group.rank()], clock.step)
    table, key = layout.table(plan.rank), int(keys[group.rank()])
    with wire.times.measure("reduce", "encode", device):
        ops.encode(as_bytes(values), table, key, header, own, levels)
    wire.observe(table, values)
    with (
        collective("all-reduce between replicas", plan.names, clock.step),
        wire.times.measure("reduce", "wire", device),
    ):
        seen = transport.start_all_gather(payloads, own, group).wait()
    wire.traffic.gathered("reduce", group, size)
    # In fp32 it would be a reduce-scatter and an all-gather.
    wire.traffic.in_fp32("reduce", group.size(), 2 * layout.num_values // plan.world_size)
    if check_headers(seen, layout, ranks, clock.step, plan) != PayloadStatus.KEPT:
        raise GradientsDiffer
    total = wire.buffers.take("sums", 4 * values.numel(), device)
    with wire.times.measure("reduce", "decode", device):
        given, parts = payloads.view(-1, size), layout.parts(route, keys)
        ops.decode_all(given, layout.fp32_tables, parts, total[None], levels)
    sums = total.view(torch.float32)
    layout.rotate(sums[None], plan.rank)
    layout.expand(plan.rank, sums.div_(divisor), tensor)
