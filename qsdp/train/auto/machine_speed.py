"""What the cost model needs to know of this machine, measured in a few seconds.

Nothing here touches a run's model, its data or torch's own random generators.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsdp import ops
from qsdp.codec.payload import Layout, Segment
from qsdp.comm.nodes import launched_ranks
from qsdp.common.dtypes import DType, of_precision
from qsdp.common.rounding import Rounding
from qsdp.config import QSDPConfig
from qsdp.models.registry import family_of_size
from qsdp.models.size import ModelSize
from qsdp.train.config import TrainConfig

COMPUTE_S = 3.0
CODEC_S = 1.0
_MOST_TRIES = 20  # of passes
_MOST_REPEATS = 5
_SHORT = 32  # tokens of the first try: a block may be too slow for a whole batch
_OF_A_KIND = 1 << 20  # values that are coded, or stepped, to find out how fast it goes
_MEMORY = Path("/proc/meminfo")
_OF_A_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files of the most memory that its processes may take together, and of what they take.
The limit may also be a word.
"""


def computation_s(
    config: TrainConfig, size: ModelSize, device: torch.device
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of a forward and of a backward pass of one block, and of the model without blocks.

    They are on a micro-batch of this rank. It takes about ``COMPUTE_S`` at most, except the first
    call of each.
    """
    dtype = of_precision(config.run.precision)
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        root = family_of_size(size).build(replace(size, num_layers=1))
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
        whole = config.run.batch_size, config.run.seq_len
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
        rounding=Rounding.of(wire.rounding_of(bits, is_grad=False)),
    )
    layout = Layout([segment], 0)
    table, header = torch.tensor(layout.table([numel])), layout.header(0, 0)
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(numel, generator=generator, device=device).view(torch.uint8)
    payload = torch.empty(layout.payload_bytes, dtype=torch.uint8, device=device)
    encode = _median(lambda: ops.encode(values, table, 0, header, payload), device, limit_s / 2)
    decode = _median(lambda: ops.decode(payload, table, 0, values), device, limit_s / 2)
    return encode / numel, decode / numel


def free_bytes(device: torch.device) -> float:
    """Bytes that are free for this rank, an equal share of what ranks have together.

    Infinite where nothing says. Raises ValueError as ``launched_ranks``.
    """
    num_ranks = launched_ranks()
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / -(-num_ranks // torch.cuda.device_count())
    free = _free_of_machine()
    for limit, used in _OF_A_CONTAINER:
        with suppress(OSError, ValueError):
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0.0, free) / num_ranks


def _free_of_machine() -> float:
    with suppress(OSError, ValueError):  # free pages leave out what caches would give back
        said = re.search(r"^MemAvailable: +(\d+) kB$", _MEMORY.read_text(), re.MULTILINE)
        if said is not None:
            return 1024 * int(said[1])
    with suppress(OSError, ValueError, AttributeError):
        pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        if min(pages, size) > 0:
            return pages * size
    return math.inf


def _grown(
    run: Callable[[int, int], tuple[float, float]], batch: int, length: int, limit_s: float
) -> tuple[float, float]:
    """The seconds that ``run`` takes for ``batch`` sequences of ``length``.

    Where that would take more than ``limit_s``, fewer tokens are timed, and scaled up. It is the
    median of its tries but the first, which still has to find its memory, unless that takes too
    long for a second: the fastest may be one beside which another rank of the machine did nothing.

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
    started = now(device)
    loss = forward()
    between = now(device)
    loss.backward()
    ended = now(device)
    module.zero_grad()
    return between - started, ended - between


def _median(run: Callable[[], Any], device: torch.device, limit_s: float) -> float:
    """Seconds that ``run`` takes, the first time left out."""
    run()
    started = now(device)
    found: list[float] = []
    while len(found) < _MOST_REPEATS:
        begun = now(device)
        run()
        found.append(now(device) - begun)
        if begun + found[-1] - started > limit_s:
            break
    return statistics.median(found)


def now(device: torch.device) -> float:
    """For the speed of a machine: seconds, once ``device`` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
