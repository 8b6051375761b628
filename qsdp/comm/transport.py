"""The collectives that payloads travel by.

[Note: Staging] NCCL, and gloo on CPUs, take payloads where they lie. gloo works in host memory, so
there a GPU's payload is staged: copied to pinned memory behind the stream's work so far, exchanged
between the hosts, and copied back on the stream that is current when the exchange is waited for.
That costs two copies and one wait of the host for the stream. In return several ranks can share a
GPU, which NCCL refuses, and headers can be read on their way, as on CPUs.

torch keeps a pool of pinned memory and knows which copies still read it: a staging buffer is taken
from there with every exchange, and dropped after it.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import compat


class Arrival:
    """A collective under way: its output may be used once it was waited for."""

    def __init__(self, output: Tensor, host: Tensor | None, work: dist.Work | None = None) -> None:
        self._output, self._host, self._work = output, host, work

    def wait(self) -> Tensor | None:
        """Complete the output, in the order of the current stream; to be called once.

        Returns the same bytes where the host can read them at once; None on NCCL.
        """
        if self._work is not None:
            self._work.wait()
        if self._host is not None and self._host is not self._output:
            self._output.copy_(self._host, non_blocking=True)
        return self._host


def all_gather(
    output: Tensor, input: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> Arrival:
    """All-gather 1-D ``input`` into ``output``, of which ``input`` may be this rank's part.

    ``async_op``: beside what this thread does until it waits for the arrival.
    """
    if not is_staged(group, output.device):
        work = compat.all_gather(output, input, group, async_op=async_op)
        return Arrival(output, output if output.device.type == "cpu" else None, work)
    host = _staging_of(output)
    own = host.chunk(group.size())[group.rank()]
    _to_host(own, input)
    work = compat.all_gather(
        host.view(torch.uint8), own.view(torch.uint8), group, async_op=async_op
    )
    return Arrival(output, host, work)


def all_to_all(
    output: Tensor,
    input: Tensor,
    received: list[int],
    sent: list[int],
    group: dist.ProcessGroup,
) -> Arrival:
    """Send ``sent[r]`` values of 1-D ``input`` to rank r, and receive ``received[r]`` from it.

    On CPUs it runs beside what this thread does until it waits for the arrival.
    """
    on_cpu = output.device.type == "cpu"
    if not is_staged(group, output.device):
        work = dist.all_to_all_single(output, input, received, sent, group=group, async_op=on_cpu)
        return Arrival(output, output if on_cpu else None, work)
    host, own = _staging_of(output), _staging_of(input)
    _to_host(own, input)
    dist.all_to_all_single(host, own, received, sent, group=group)
    return Arrival(output, host)


def is_staged(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether tensors of ``device`` go through host memory: [Note: Staging]."""
    return device.type != "cpu" and compat.backend_of(group, device) == "gloo"


def is_seen(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether every rank of ``group`` reads the headers of what it receives."""
    return device.type == "cpu" or is_staged(group, device)


def _staging_of(tensor: Tensor) -> Tensor:
    is_pinned = tensor.device.type != "cpu"  # on CPUs only tests stage
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)


def _to_host(host: Tensor, tensor: Tensor) -> None:
    host.copy_(tensor, non_blocking=True)
    if tensor.device.type != "cpu":
        torch.accelerator.current_stream(tensor.device.index).synchronize()
