"""The collectives that payloads travel by.

[Note: Staging] NCCL, and gloo on CPUs, take payloads where they lie. gloo works in host memory, so
there a GPU's payload is staged: copied to pinned memory behind the stream's work so far, exchanged
between the hosts, and copied back on the stream that is current when the exchange is waited for.
That costs two copies and one wait of the host for the stream. In return several ranks can share a
GPU, which NCCL refuses, and headers can be read on their way, as on CPUs.

torch keeps a pool of pinned memory and knows which copies still read it: a staging buffer is taken
from there with every exchange, and dropped after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import count
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.compat.process_groups import backend_of
from qsdp.compat.torch_collectives import all_gather_single

_TAG = 0x95D
"""The tag of qsdp's messages between two ranks: others' (pipelining) are not taken for them."""

_unclaimed: WeakKeyDictionary[dist.ProcessGroup, list[tuple[int, list[dist.Work]]]]
_unclaimed = WeakKeyDictionary()
"""Messages under way that nobody waits for any more, with the numbers of their exchanges."""
_numbers = count()


class Arrival:
    """A collective that the transport has under way: its output may be used after a wait.

    The messages of one that is dropped before are kept until a later exchange of the same ranks has
    arrived, behind them: gloo ends a connection at which a message arrives that has no buffer.
    """

    def __init__(
        self,
        output: Tensor,
        host: Tensor | None,
        group: dist.ProcessGroup | None = None,
        works: Sequence[dist.Work] = (),
    ) -> None:
        self._output, self._host, self._group, self._works = output, host, group, works
        self._number = next(_numbers)
        self._dropped = weakref.finalize(self, _keep_unclaimed, group, self._number, works)
        self._dropped.atexit = False

    def wait(self) -> Tensor | None:
        """Complete the output, in the order of the current stream; to be called once.

        Returns the same bytes where the host can read them at once; None on NCCL.
        """
        for work in self._works:
            work.wait()
        self._dropped.detach()
        if self._works and self._group is not None and self._group in _unclaimed:
            _claim(self._group, self._number)
        if self._host is not None and self._host is not self._output:
            self._output.copy_(self._host, non_blocking=True)
        return self._host


def start_all_gather(
    output: Tensor, input: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> Arrival:
    """Start the transport of an all-gather, of 1-D ``input`` into ``output``.

    ``input`` may be this rank's part of ``output``.
    ``async_op``: it runs beside what this thread does until it waits for the arrival.
    """
    host, own = output, input
    if is_staged(group, output.device):
        host = _staging_of(output).view(torch.uint8)
        own = host.chunk(group.size())[group.rank()]
        _to_host(own, input.view(torch.uint8))
    if group.size() == 2 and _is_gloo(host, group):
        parts = list(host.chunk(2))
        if own.data_ptr() != parts[group.rank()].data_ptr():
            parts[group.rank()].copy_(own)
        works = _exchange(parts, [own, own], group)
    else:
        work = all_gather_single(host, own, group, async_op=async_op)
        works = [] if work is None else [work]
    return _arrival_of(output, host.view(output.dtype), group, works)


def start_all_to_all(
    output: Tensor,
    input: Tensor,
    received: list[int],
    sent: list[int],
    group: dist.ProcessGroup,
) -> Arrival:
    """Start the transport of ``sent[r]`` values of 1-D ``input`` to each rank r.

    And of ``received[r]`` from it. None go to and from itself. On CPUs it runs beside what this
    thread does until it waits for the arrival.
    """
    host, own = output, input
    if is_staged(group, output.device):
        host, own = _staging_of(output), _staging_of(input)
        _to_host(own, input)
    if _is_gloo(host, group):
        works = _exchange(host.split(received), own.split(sent), group)
    else:
        is_async = host.device.type == "cpu"
        work = dist.all_to_all_single(host, own, received, sent, group=group, async_op=is_async)
        works = [] if work is None else [work]
    return _arrival_of(output, host, group, works)


def _exchange(
    received: Sequence[Tensor], sent: Sequence[Tensor], group: dist.ProcessGroup
) -> list[dist.Work]:
    """Send ``sent[r]`` to every other rank r, and receive ``received[r]`` from it.

    Receives are posted first. gloo sends nothing before it has heard that the receiver is ready,
    which the receiver says on the connection that its own message takes: a rank that sends first,
    as gloo's own all-to-all does, lets the other one wait until that message is through, and the
    two directions of the link work in turns.
    """
    me, size = group.rank(), group.size()
    # Not all to one rank at once.
    to, of = ([(me + sign * i) % size for i in range(1, size)] for sign in (1, -1))
    works = [dist.irecv(received[r], group=group, group_src=r, tag=_TAG) for r in of]
    works += [dist.isend(sent[r], group=group, group_dst=r, tag=_TAG) for r in to]
    return [work for work in works if work is not None]


def _arrival_of(
    output: Tensor, host: Tensor, group: dist.ProcessGroup, works: list[dist.Work]
) -> Arrival:
    return Arrival(output, host if host.device.type == "cpu" else None, group, works)


def _is_gloo(tensor: Tensor, group: dist.ProcessGroup) -> bool:
    return tensor.device.type == "cpu" and backend_of(group, tensor.device) == "gloo"


def _keep_unclaimed(
    group: dist.ProcessGroup | None, number: int, works: Sequence[dist.Work]
) -> None:
    if group is not None and works:
        _unclaimed.setdefault(group, []).append((number, [*works]))


def _claim(group: dist.ProcessGroup, number: int) -> None:
    """Let go of what came before the exchange ``number``, which has arrived."""
    kept = _unclaimed[group]
    for other, works in [each for each in kept if each[0] < number]:
        for work in works:
            work.wait()
        kept.remove((other, works))
    if not kept:
        del _unclaimed[group]


def is_staged(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the transport of tensors of ``device`` is by host memory: [Note: Staging]."""
    return device.type != "cpu" and backend_of(group, device) == "gloo"


def host_can_read(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the transport over ``group`` shows every rank's host the headers it receives."""
    return device.type == "cpu" or is_staged(group, device)


def _staging_of(tensor: Tensor) -> Tensor:
    is_pinned = tensor.device.type != "cpu"  # on CPUs only tests stage
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)


def _to_host(host: Tensor, tensor: Tensor) -> None:
    host.copy_(tensor, non_blocking=True)
    if tensor.device.type != "cpu":
        torch.accelerator.current_stream(tensor.device.index).synchronize()
