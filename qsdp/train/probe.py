"""What the cost model needs to know of this machine and its link, measured in a few seconds.

Nothing here touches a run's model, its data or torch's own random generators.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsdp import compat
from qsdp.codec.payload import DType, Layout, Segment
from qsdp.comm import transport
from qsdp.comm.topology import Hops, launched_ranks
from qsdp.config import ROUNDINGS, QSDPConfig
from qsdp.models import GPT, GPTConfig
from qsdp.train.config import TrainConfig
from qsdp.train.cost_model import Transfer
from qsdp.train.signals import Stop

LIMIT_S = 9.0
"""Of all measuring together: 10 less what ends late, since whatever was begun is ended."""
COMPUTE_S = 3.0
CODEC_S = 1.0
_MOST_TRIES = 20  # of passes
_MOST_REPEATS = 5
_SHORT = 32  # tokens of the first try: a block may be too slow for a whole batch
_OF_A_KIND = 1 << 20  # values that are coded, or stepped, to find out how fast it goes
_FIRST_BYTES = 1 << 12  # to each peer: there may be many, and the link be slow
_LEAST_MOST_BYTES, _MOST_BYTES = 1 << 20, 1 << 24  # less says little of a fast link
_MOST_TIMES = 20
_LATENCY_BYTES = 64
_BATCHES = 3  # of calls, whose median counts
_MEMORY = Path("/proc/meminfo")


def computation_s(
    config: TrainConfig, size: GPTConfig, device: torch.device
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of a forward and of a backward pass of one block, and of the model without blocks,
    on a micro-batch of this rank. Takes about `COMPUTE_S` at most, but for the first call of
    each."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        root = GPT(replace(size, num_layers=1))
    root.to_empty(device=device).to(dtype)
    with torch.no_grad():
        for parameter in root.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    block = root.blocks[0]
    root.blocks = nn.ModuleList()

    def of_block(batch: int, length: int) -> tuple[float, float]:
        shape = (batch, length, size.width)
        given = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        given.requires_grad_()
        return _passes(block, lambda: block(given).sum(), device)

    def of_root(batch: int, length: int) -> tuple[float, float]:
        shape = (batch, length)
        tokens = torch.randint(size.vocab_size, shape, generator=generator, device=device)
        return _passes(root, lambda: root(tokens, tokens)[1], device)

    # Dropout would draw from torch's own generators.
    with torch.random.fork_rng([] if device.type == "cpu" else [device.index]):
        whole = config.batch_size, config.seq_len
        rest = _grown(of_root, *whole, COMPUTE_S / 3)
        return _grown(of_block, *whole, 2 * COMPUTE_S / 3), rest


def optimizer_s(device: torch.device) -> float:
    """Seconds a value of an AdamW step."""
    parameter = torch.zeros(_OF_A_KIND, device=device, requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    return _median(lambda: optimizer.step(), device, 0.3) / _OF_A_KIND


def codec_s(
    wire: QSDPConfig, num_values: int, device: torch.device, limit_s: float
) -> tuple[float, float]:
    """Seconds a value to encode, and to decode, as many weights as a block's shard has."""
    numel = min(num_values, _OF_A_KIND)
    bits = wire.weight_bits
    segment = Segment(
        bits=bits,
        dtype=DType.FP32,
        padded=numel,
        parameter=0,
        bucket=wire.bucket_of(bits, is_grad=False),
        rounding=ROUNDINGS.index(wire.rounding_of(bits)),
    )
    layout = Layout([segment], 0)
    table, header = torch.tensor(layout.table([numel])), layout.header(0, 0)
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(numel, generator=generator, device=device).view(torch.uint8)
    payload = torch.empty(layout.payload_bytes, dtype=torch.uint8, device=device)
    encode = _median(
        lambda: torch.ops.qsdp.encode(values, table, 0, header, payload), device, limit_s / 2
    )
    decode = _median(lambda: torch.ops.qsdp.decode(payload, table, 0, values), device, limit_s / 2)
    return encode / numel, decode / numel


def free_bytes(device: torch.device) -> float:
    """Memory that is free for this rank, an equal share of what ranks have together; infinite where
    nothing says. Raises ValueError as `launched_ranks`."""
    num_ranks = launched_ranks()
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / -(-num_ranks // torch.cuda.device_count())
    with suppress(OSError, ValueError):  # free pages leave out what caches would give back
        said = re.search(r"^MemAvailable: +(\d+) kB$", _MEMORY.read_text(), re.MULTILINE)
        if said is not None:
            return 1024 * int(said[1]) / num_ranks
    with suppress(OSError, ValueError, AttributeError):
        pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        if min(pages, size) > 0:
            return pages * size / num_ranks
    return math.inf


class Links:
    """Measures the collectives. All ranks make one and call `measured`.

    Ranks decide how much to send next by times of the slowest rank, which all have: so they stay
    together without asking rank 0. With these times go what each has spent since measuring began,
    whatever on, and that one was told to end.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        hops: Hops | None,
        most_bytes: Mapping[str, int],
        began: float,
        spent_s: float,
        stop: Stop,
    ) -> None:
        """``most_bytes``: of `gather` and `reduce`, what a rank brings at most. ``began``: when
        measuring did, by this rank's clock. ``spent_s``: since then, the same on all ranks."""
        self._group, self._device, self._hops = group, device, hops
        self._most, self._began, self._stop = most_bytes, began, stop
        self._left, self._round_s = LIMIT_S - spent_s, 0.0
        self._is_staged = device.type != "cpu" and transport.is_staged(group, device)

    def measured(self) -> dict[str, Transfer]:
        """By the names of `Measured`, whatever there is. Raises Told."""
        kinds: list[tuple[str, str, Callable[[int], Callable[[], Any]]]] = [
            ("reduce", "reduce", lambda size: self._all_to_all(size, self._group)),
            ("gather", "gather", lambda size: self._all_gather(size, self._group)),
            ("stock_reduce", "reduce", self._stock_reduce),
            ("stock_gather", "gather", self._stock_gather),
        ]
        hops = self._hops
        if hops is not None:
            kinds += [
                ("gather_across", "gather", lambda size: self._all_gather(size, hops.across)),
                ("gather_local", "gather", lambda size: self._all_gather(size, hops.local)),
                ("reduce_across", "reduce", lambda size: self._all_to_all(size, hops.across)),
                ("reduce_local", "reduce", lambda size: self._all_to_all(size, hops.local)),
            ]
        found = {}
        for place, (name, direction, prepare) in enumerate(kinds):
            share = max(0.0, self._left) / (len(kinds) - place)
            most = min(max(self._most[direction], _LEAST_MOST_BYTES), _MOST_BYTES)
            found[name] = self._transfer(prepare, most, share)
        return found

    def _transfer(
        self, prepare: Callable[[int], Callable[[], Any]], most: int, limit_s: float
    ) -> Transfer:
        """Send more and more, until that says enough, then as often as the time allows: routers and
        shapers let a burst pass before they show their rate.

        A round is a `_timed`, which takes ``idle`` seconds more than what it times: where each
        answer takes long, that is most of it. There must be one, whatever the time.
        """
        ends, latency = self._left - limit_s, math.inf
        if limit_s > 2 * self._round_s:
            latency, *_ = self._round(prepare(_LATENCY_BYTES))  # it may have had to connect
        if limit_s > 4 * _BATCHES * self._round_s:
            latency, _ = self._timed_often(prepare(_LATENCY_BYTES), 1)
        size = _FIRST_BYTES
        while True:
            seconds, idle, busy = self._round(prepare(size))
            sending = max(0.0, seconds - latency)
            growth = 8 if seconds < 1.5 * latency else 2
            # Twice what the next should take: it is sent again, or meets the end of a burst.
            if size == most or self._left - (idle + latency + 2 * growth * sending) < ends:
                break
            size = min(growth * size, most)
        times = min(_MOST_TIMES, int((self._left - ends - _BATCHES * idle) / seconds))
        if times > _BATCHES:
            seconds, busy = self._timed_often(prepare(size), times // _BATCHES)
        elif (times := min(_BATCHES, int((self._left - ends - idle) / seconds))) > 0:
            seconds, busy = self._timed(prepare(size), times)
        # What was sent took what it took, however the parts of that were measured.
        latency = min(latency, 0.9 * seconds)
        rate = size / (seconds - latency)
        is_on_host = self._device.type == "cpu"
        is_busy = min(1.0, busy / seconds) if is_on_host else float(self._is_staged)
        return Transfer(latency_s=latency, bytes_per_s=rate, busy=is_busy, num_bytes=size)

    def _round(self, run: Callable[[], Any]) -> tuple[float, float, float]:
        """One call: its seconds, those that it took to time it, and its processor seconds."""
        before = self._left
        seconds, busy = self._timed(run, 1)
        self._round_s = before - self._left
        return seconds, max(0.0, self._round_s - seconds), busy

    def _timed_often(self, run: Callable[[], Any], times: int) -> tuple[float, float]:
        """The medians of some `_timed`."""
        found = [self._timed(run, times) for _ in range(_BATCHES)]
        seconds, busy = (statistics.median(each) for each in zip(*found, strict=True))
        return seconds, busy

    def _timed(self, run: Callable[[], Any], times: int) -> tuple[float, float]:
        """Seconds, and processor seconds, of one of ``times`` calls in a row: the slowest's."""
        dist.all_reduce(torch.zeros(1, device=self._device), group=self._group)  # begin together
        used, started = time.process_time(), _now(self._device)
        for _ in range(times):
            run()
        ended = _now(self._device)
        own = [ended - started, time.process_time() - used, ended - self._began]
        own.append(self._stop.asked is not None)
        slowest = torch.tensor(own, dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self._group)
        seconds, busy, spent, is_asked = slowest.tolist()
        self._stop.is_agreed |= is_asked > 0
        self._stop.check()
        self._left = LIMIT_S - spent
        return seconds / times, busy / times

    def _all_gather(self, size: int, group: dist.ProcessGroup) -> Callable[[], Any]:
        gathered = self._bytes(group.size() * size)
        own = gathered.chunk(group.size())[group.rank()]
        return lambda: transport.all_gather(gathered, own, group, async_op=True).wait()

    def _all_to_all(self, size: int, group: dist.ProcessGroup) -> Callable[[], Any]:
        sent, received = (self._bytes((group.size() - 1) * size) for _ in range(2))
        splits = [size if rank != group.rank() else 0 for rank in range(group.size())]
        return lambda: transport.all_to_all(received, sent, splits, splits, group).wait()

    def _stock_gather(self, size: int) -> Callable[[], Any]:
        gathered = self._bytes(self._group.size() * size)
        own = gathered.chunk(self._group.size())[self._group.rank()]
        return lambda: compat.all_gather(gathered, own, self._group)

    def _stock_reduce(self, size: int) -> Callable[[], Any]:
        given = self._bytes(self._group.size() * size).view(torch.float32)
        summed = self._bytes(size).view(torch.float32)
        return lambda: compat.reduce_scatter(summed, given, self._group)

    def _bytes(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self._device)


def _grown(
    run: Callable[[int, int], tuple[float, float]], batch: int, length: int, limit_s: float
) -> tuple[float, float]:
    """What ``run`` takes for ``batch`` sequences of ``length``; for fewer tokens, and scaled up,
    where that would take more than ``limit_s``. The median of its tries but the first, which still
    has to find its memory, unless that takes too long for a second: the fastest may be one beside
    which another rank of the machine did nothing.

    The very first call, of the fewest tokens, only sets libraries up and is not counted. Later ones
    may still load a kernel: whether to grow is never decided by one that was not repeated.
    """
    run(*next(_shapes(batch, length)))
    ends = time.perf_counter() + limit_s
    shape, tries = (1, 1), [(0.0, 0.0)]

    def is_slow() -> bool:  # the next is up to four times as large
        return 5 * min(map(sum, tries)) > ends - time.perf_counter()

    for shape in _shapes(batch, length):
        tries = [run(*shape)]
        if is_slow() and sum(tries[0]) < limit_s:
            tries.append(run(*shape))
        if is_slow():
            break
    while len(tries) < _MOST_TRIES and time.perf_counter() + min(map(sum, tries)) < ends:
        tries.append(run(*shape))
    scale, kept = batch * length / (shape[0] * shape[1]), tries[1:] or tries
    forward, backward = (scale * statistics.median(each) for each in zip(*kept, strict=True))
    return forward, backward


def _shapes(batch: int, length: int) -> Iterator[tuple[int, int]]:
    """Sequences and their length, up to four times as many tokens from one to the next."""
    num, tokens = 1, min(_SHORT, length)
    yield num, tokens
    while (num, tokens) != (batch, length):
        if tokens < length:
            tokens = min(4 * tokens, length)
        else:
            num = min(4 * num, batch)
        yield num, tokens


def _passes(
    module: nn.Module, forward: Callable[[], Tensor], device: torch.device
) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    started = _now(device)
    loss = forward()
    between = _now(device)
    loss.backward()
    ended = _now(device)
    module.zero_grad()
    return between - started, ended - between


def _median(run: Callable[[], Any], device: torch.device, limit_s: float) -> float:
    """Seconds that ``run`` takes, the first time left out."""
    run()
    started = _now(device)
    found: list[float] = []
    while len(found) < _MOST_REPEATS:
        begun = _now(device)
        run()
        found.append(_now(device) - begun)
        if begun + found[-1] - started > limit_s:
            break
    return statistics.median(found)


def _now(device: torch.device) -> float:
    """Seconds on a clock, once ``device`` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
