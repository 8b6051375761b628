"""The quantized all-gather of weights."""

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import compat
from qsdp.codec.payload import HEADER_BYTES, Standing
from qsdp.comm.clock import Clock
from qsdp.comm.failures import collective
from qsdp.comm.plan import Plan, Side
from qsdp.comm.scratch import Scratch
from qsdp.comm.traffic import Traffic


def gather(
    plan: Plan,
    side: Side,
    output: Tensor,
    input: Tensor,
    clock: Clock,
    traffic: Traffic,
    scratch: Scratch,
) -> None:
    """All-gather ``input`` (this rank's flat shard) into ``output`` as payloads.

    1. Encode this rank's shard. The input may be a view into the output: it is read first.
    2. One all-gather of payloads.
    3. Check every header: version, step, sender, size, plan.
    4. Decode every rank's payload into its slice of the output, this rank's own too: all ranks
       compute with the same weights.

    Raises RuntimeError when a header is not what this rank expects (ranks that disagree).
    """
    size = side.layout.payload_bytes
    payloads = scratch.take("gather", plan.world_size * size, output.device)
    own = payloads.narrow(0, plan.rank * size, size)
    key = clock.gather_key(plan.rank)
    header = side.layout.header(plan.rank, clock.step)
    torch.ops.qsdp.encode(as_bytes(input), side.tables[plan.rank], key, header, own)
    with collective("gather", plan.names, clock.step):
        compat.all_gather(payloads, own, plan.group)
    traffic.sent("gather", plan.group, size, side.layout.num_values)
    check_headers(payloads, side, range(plan.world_size), clock.step, plan)
    slices = as_bytes(output).chunk(plan.world_size)
    for rank, payload in enumerate(payloads.split(size)):
        key = clock.gather_key(rank)
        torch.ops.qsdp.decode(payload, side.tables[rank], key, slices[rank])


def regather(output: Tensor, input: Tensor, group: dist.ProcessGroup, traffic: Traffic) -> None:
    """All-gather weights that were decoded before, as they are: never quantize twice."""
    with collective("gather of decoded weights"):
        compat.all_gather(output, input, group)
    num_bytes = input.numel() * input.element_size()
    num_values = input.numel() if input.is_floating_point() else num_bytes // 4
    traffic.sent("gather", group, num_bytes, num_values)


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous 1-D tensor as uint8."""
    return tensor.view(torch.uint8)


def check_headers(
    payloads: Tensor,
    side: Side,
    senders: range | list[int],
    step: int,
    plan: Plan,
    standing: Standing = Standing.KEPT,
) -> Standing:
    """Raise RuntimeError unless every payload opens as expected.

    On a GPU it would stop the stream, so there the size of the collective is the only check, but
    for a rank whose own ``standing`` is not KEPT.

    Returns this rank's standing ([Note: Consent]) after what it heard of the senders'.
    """
    if not len(senders) or (payloads.device.type != "cpu" and standing == Standing.KEPT):
        return standing
    found = payloads.view(len(senders), -1)[:, :HEADER_BYTES].view(torch.int64)
    expected = side.expected_headers(senders, step)
    if standing == Standing.KEPT and torch.equal(found, expected):
        return standing
    difference = found.cpu() ^ expected
    heard = difference[:, 3].tolist()
    difference[:, 3] = torch.tensor([each not in list(Standing) for each in heard])
    if difference.any():
        row = int(difference.any(1).nonzero()[0])
        raise RuntimeError(
            f"rank {senders[row]} sent a payload with header {found[row].tolist()} for the group "
            f"of {plan.name}, but {expected[row].tolist()} is expected (version and sender, "
            "step, bytes, plan): run the same model, config and step on every rank"
        )
    return standing if set(heard) == {standing} else Standing.MIXED
