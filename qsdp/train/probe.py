"""What the cost model needs to know of this machine and its link, measured in a few seconds.

Nothing here touches a run's model, its data or torch's own random generators.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsdp import compat
from qsdp.codec.payload import DType, Layout, Segment
from qsdp.comm import transport
from qsdp.comm.topology import Hops
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


def computation_s(
    config: TrainConfig, size: GPTConfig, device: torch.device
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of a forward and of a backward pass of one block, and of the model without blocks,
    on a micro-batch of this rank. Takes about `COMPUTE_S` at most."""
    ends = time.perf_counter() + COMPUTE_S
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
        rest = _grown(of_root, *whole, COMPUTE_S / 2)
        return _grown(of_block, *whole, ends - time.perf_counter()), rest


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


class Links:
    """Measures the collectives. All ranks make one and call `measured`.

    Ranks decide how much to send next by times of the slowest rank, which all have: so they stay
    together without asking rank 0. That one was told to end goes with these times.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        hops: Hops | None,
        most_bytes: Mapping[str, int],
        limit_s: float,
        stop: Stop,
    ) -> None:
        """``most_bytes``: of `gather` and `reduce`, what a rank brings at most. ``limit_s``: for
        all together, the same on all ranks."""
        self._group, self._device, self._hops = group, device, hops
        self._most, self._left, self._stop = most_bytes, limit_s, stop
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
        shapers let a burst pass before they show their rate."""
        self._timed(prepare(_LATENCY_BYTES), 1)
        latency, _ = self._timed_often(prepare(_LATENCY_BYTES), 1)
        size, spent = _FIRST_BYTES, 0.0
        while True:
            seconds, busy = self._timed(prepare(size), 1)
            spent += seconds
            if size == most or spent + 4 * seconds > limit_s:
                break
            size = min(2 * size, most)
        times = min(_MOST_TIMES, int((limit_s - spent) / seconds))
        if times > _BATCHES:
            seconds, busy = self._timed_often(prepare(size), times // _BATCHES)
        elif times > 0:
            seconds, busy = self._timed(prepare(size), times)
        # What was sent took what it took, however the parts of that were measured.
        latency = min(latency, 0.9 * seconds)
        rate = size / (seconds - latency)
        is_on_host = self._device.type == "cpu"
        is_busy = min(1.0, busy / seconds) if is_on_host else float(self._is_staged)
        return Transfer(latency_s=latency, bytes_per_s=rate, busy=is_busy)

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
        own = [_now(self._device) - started, time.process_time() - used]
        own.append(self._stop.asked is not None)
        slowest = torch.tensor(own, dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self._group)
        seconds, busy, is_asked = slowest.tolist()
        self._stop.is_agreed |= is_asked > 0
        self._stop.check()
        self._left -= seconds
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
    where that would take too long. The median of its tries but the first, which still has to find
    its memory, unless that takes too long for a second: the fastest may be one beside which another
    rank of the machine did nothing."""
    ends = time.perf_counter() + limit_s
    shape, tries = (1, 1), [(0.0, 0.0)]
    for shape in _shapes(batch, length):
        tries = [run(*shape)]
        if 5 * sum(tries[0]) > ends - time.perf_counter():  # the next is up to four times as large
            break
    # The first may have taken all the time, and the next be a fraction of it.
    while (len(tries) < 2 and sum(tries[0]) < limit_s) or (
        len(tries) < _MOST_TRIES and time.perf_counter() + min(map(sum, tries)) < ends
    ):
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
