"""What the cost model needs to know of the links between ranks, measured in a few seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.comm import transport
from qsdp.comm.topology import StageGroup
from qsdp.compat.torch_collectives import all_gather_single, reduce_scatter_single
from qsdp.train.auto.cost_model import Transfer
from qsdp.train.auto.machine_speed import now
from qsdp.train.signals import Stop

LIMIT_S = 9.0
"""The limit of all measuring: 10 less what ends late, since whatever was begun is ended."""
_FIRST_BYTES = 1 << 12  # to each peer: there may be many, and the link be slow
_LEAST_MOST_BYTES, _MOST_BYTES = 1 << 20, 1 << 24  # less says little of a fast link
_MOST_TIMES = 20
_LATENCY_BYTES = 64


class Links:
    """Measures the collectives. All ranks make one and call ``measured``.

    Ranks decide how much to send next by times of the slowest rank, which all have: so they stay
    together without asking rank 0. With these times go what each has spent since measuring began,
    whatever on, and that one was told to end.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        stages: Sequence[StageGroup],
        most_bytes: Mapping[str, int],
        began: float,
        spent_s: float,
        stop: Stop,
    ) -> None:
        """Take what the links are measured by.

        Args:
            stages: Other groups than that of all ranks.
            most_bytes: What a rank brings at most to ``gather`` and ``reduce``.
            began: When measuring began, by this rank's clock.
            spent_s: Seconds since then, the same on all ranks.
        """
        self._group, self._device, self._stages = group, device, stages
        self._most, self._began, self._stop = most_bytes, began, stop
        self._left = LIMIT_S - spent_s
        # Of those so far; none is known of a link that never had time for it.
        self._least_round_s = self._least_latency_s = 0.0
        self._is_staged = device.type != "cpu" and transport.is_staged(group, device)

    def measured(self) -> dict[str, Transfer]:
        """Whatever transfers there are, by the names of ``Measured``. Raises StopRequested."""
        kinds: list[tuple[str, str, Callable[[int], Callable[[], Any]]]] = [
            ("reduce", "reduce", lambda size: self._all_to_all(size, self._group)),
            ("gather", "gather", lambda size: self._all_gather(size, self._group)),
            ("stock_reduce", "reduce", self._stock_reduce),
            ("stock_gather", "gather", self._stock_gather),
        ]
        for direction, exchange in (("gather", self._all_gather), ("reduce", self._all_to_all)):
            for stage in reversed(self._stages):
                name = f"{direction}_{stage.stage.name.lower()}"
                kinds.append((name, direction, partial(exchange, group=stage.group)))
        found = {}
        for place, (name, direction, prepare) in enumerate(kinds):
            share = max(0.0, self._left) / (len(kinds) - place)
            most = min(max(self._most[direction], _LEAST_MOST_BYTES), _MOST_BYTES)
            found[name] = self._transfer(prepare, most, share)
        return found

    def _transfer(
        self, prepare: Callable[[int], Callable[[], Any]], most: int, limit_s: float
    ) -> Transfer:
        """Send more and more, until that says enough, then as often as the time allows.

        Routers and shapers let a burst pass before they show their rate. A ``_timed`` takes
        ``idle`` seconds more than what it times: where each answer takes long, that is most of it.
        There must be one, whatever the time.
        """
        ends, latency = self._left - limit_s, self._least_latency_s
        if limit_s > 2 * self._least_round_s:
            small = prepare(_LATENCY_BYTES)
            latency, idle, _ = self._timed(small)  # it may have had to connect
            if limit_s > 12 * (idle + latency):
                latency = statistics.median(self._timed(small)[0] for _ in range(3))
        size, is_again = _FIRST_BYTES, False
        spare = limit_s / 2  # what one that was held up may take of other kinds' time
        while True:
            seconds, idle, busy = self._timed(prepare(size))
            latency = min(latency, seconds)
            if size == most:
                break
            growth = 8 if seconds < 1.5 * latency else 2
            # Twice what the next should take: it is sent again, or meets the end of a burst.
            if self._left - (idle + latency + 2 * growth * (seconds - latency)) >= ends:
                size, is_again = min(growth * size, most), False
            elif is_again or seconds + idle > spare:
                break
            else:  # something may have held it up
                is_again = True
        self._least_latency_s = min(self._least_latency_s or latency, latency)
        again, found = prepare(size), [(seconds, busy)]
        while len(found) <= _MOST_TIMES:
            is_sure = len(found) > 2 or (len(found) == 2 and _are_alike(found[0][0], found[1][0]))
            if self._left - (seconds + idle) < ends and (is_sure or seconds + idle > spare):
                break
            took = self._timed(again)
            found.append((took[0], took[2]))
        # The later half, which is behind a burst, but enough of them that one which was held up is
        # not what counts.
        found = found[-max(3, len(found) // 2) :] if len(found) > 2 else found[-1:]
        seconds, busy = (statistics.median(each) for each in zip(*found, strict=True))
        # What was sent took what it took, however the parts of that were measured.
        latency = min(latency, 0.9 * seconds)
        rate = size / (seconds - latency)
        is_on_host = self._device.type == "cpu"
        is_busy = min(1.0, busy / seconds) if is_on_host else float(self._is_staged)
        return Transfer(latency_s=latency, bytes_per_s=rate, busy=is_busy, num_bytes=size)

    def _timed(self, run: Callable[[], Any]) -> tuple[float, float, float]:
        """The seconds of one call, what it took to time it, and its processor seconds.

        All are those of the slowest rank. Raises StopRequested.
        """
        before = self._left
        dist.all_reduce(torch.zeros(1, device=self._device), group=self._group)  # begin together
        used, started = time.process_time(), now(self._device)
        run()
        ended = now(self._device)
        own = [ended - started, time.process_time() - used, ended - self._began]
        own.append(self._stop.asked is not None)
        slowest = torch.tensor(own, dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self._group)
        seconds, busy, spent, is_asked = slowest.tolist()
        self._stop.is_agreed |= is_asked > 0
        self._stop.check()
        self._left = LIMIT_S - spent
        took = before - self._left
        self._least_round_s = min(self._least_round_s or took, took)
        return seconds, max(0.0, took - seconds), busy

    def _all_gather(self, size: int, group: dist.ProcessGroup) -> Callable[[], Any]:
        gathered = self._bytes(group.size() * size)
        own = gathered.chunk(group.size())[group.rank()]
        return lambda: transport.start_all_gather(gathered, own, group, async_op=True).wait()

    def _all_to_all(self, size: int, group: dist.ProcessGroup) -> Callable[[], Any]:
        sent, received = (self._bytes((group.size() - 1) * size) for _ in range(2))
        splits = [size if rank != group.rank() else 0 for rank in range(group.size())]
        return lambda: transport.start_all_to_all(received, sent, splits, splits, group).wait()

    def _stock_gather(self, size: int) -> Callable[[], Any]:
        gathered = self._bytes(self._group.size() * size)
        own = gathered.chunk(self._group.size())[self._group.rank()]
        return lambda: all_gather_single(gathered, own, self._group)

    def _stock_reduce(self, size: int) -> Callable[[], Any]:
        given = self._bytes(self._group.size() * size).view(torch.float32)
        summed = self._bytes(size).view(torch.float32)
        return lambda: reduce_scatter_single(summed, given, self._group)

    def _bytes(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self._device)


def _are_alike(first_s: float, second_s: float) -> bool:
    return max(first_s, second_s) < 1.25 * min(first_s, second_s)
