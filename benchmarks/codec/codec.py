"""Encode and decode throughput of the CPU codec against memcpy.

    python -m benchmarks.codec.codec --bits 8,4 --rounding shift,dither
    python -m benchmarks.codec.codec --bits 8 --rounding shift --size 4K,64K,1M,64M,1G --threads 1,2
    python -m benchmarks.codec.codec --bits 3,4,6 --rounding stochastic,nearest --levels learned

Bytes moved are those of the values read or written plus those of the payload written or read;
adding reads its target too; memcpy reads and writes. Every round times a memcpy of as many bytes as
there are values and a batch of calls of each operation, so that a noisy neighbour slows all of them
alike; the fraction is the median over rounds of (bytes a second moved) / (memcpy's, same round).
With one thread the times are the thread's processor time: on a shared machine, waiting for a core
does not count. With more they are wall time, and memcpy is torch's copy by as many threads.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import machine
from qsdp.codec.levels import uniform_levels
from qsdp.codec.payload import Layout, Segment
from qsdp.common.dtypes import CODEC_DTYPES
from qsdp.common.json_files import write_json
from qsdp.common.rounding import Rounding
from qsdp.config import LEVELS, ROUNDINGS
from qsdp.ops import native

DTYPES = {kind.name.lower(): (kind, dtype) for dtype, kind in CODEC_DTYPES.items()}
SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
BATCH_BYTES = 32 << 20
"""Bytes of values that a batch has at least: small calls are timed many at once."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured; ``size`` is the bytes of the values."""

    kernels: str
    threads: int
    size: int
    dtype: str
    bits: int
    rounding: str

    def at_least(self) -> float | None:
        """The fraction of memcpy to reach, where there is one."""
        if self.threads > 1 or self.size != 64 << 20 or self.dtype != "fp32":
            return None
        if self.rounding in ("dither", "stochastic"):
            return {8: 0.6}.get(self.bits)
        return {8: 0.85, 4: 0.75}.get(self.bits)


def operations(
    case: Case, arguments: argparse.Namespace
) -> dict[str, tuple[int, Callable[[], object]]]:
    """The bytes moved by a call, and the call, of each operation on a segment of random values."""
    kind, dtype = DTYPES[case.dtype]
    numel = case.size // dtype.itemsize
    segment = Segment(
        bits=case.bits,
        dtype=kind,
        padded=numel,
        parameter=3,
        bucket=arguments.bucket,
        rounding=Rounding.of(case.rounding),
        levels=0 if arguments.levels == "learned" else -1,
    )
    levels = uniform_levels(case.bits).square()
    layout = Layout([segment], group=0)
    table = torch.tensor(layout.table([numel]))
    values = torch.randn(numel)
    if arguments.zeros:
        values.masked_fill_(torch.rand(numel) < arguments.zeros, 0.0)
    buffer = values.to(dtype).view(torch.uint8)
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    target = torch.zeros_like(buffer)
    header, moved = layout.header(0, 0), case.size + layout.payload_bytes
    encode, decode = torch.ops.qsdp.encode.default, torch.ops.qsdp.decode.default
    found: dict[str, tuple[int, Callable[[], object]]] = {
        "encode": (moved, lambda: encode(buffer, table, 7, header, payload, levels)),
        "decode": (moved, lambda: decode(payload, table, 7, target, False, levels)),
    }
    if case.dtype == "fp32":
        add = moved + case.size
        found["decode-add"] = (add, lambda: decode(payload, table, 7, target, True, levels))
    return found


def measure(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each operation."""
    native.use(case.kernels)
    torch.set_num_threads(case.threads)
    source = torch.randn(case.size // 4)
    copied = torch.zeros_like(source)
    if case.threads == 1:
        clock = time.thread_time

        def copy() -> None:
            ctypes.memmove(copied.data_ptr(), source.data_ptr(), case.size)
    else:
        clock = time.perf_counter

        def copy() -> None:
            copied.copy_(source)

    times = max(1, BATCH_BYTES // case.size)

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        for _ in range(times):
            call()
        return (clock() - start) / times

    found = operations(case, arguments)
    for call in (copy, *(call for _, call in found.values())):
        seconds(call)
    copies: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(arguments.rounds):
        copies.append(seconds(copy))
        for name, (_, call) in found.items():
            taken[name].append(seconds(call))
    rows = []
    for name, (moved, _) in found.items():
        ratios = [
            moved / operation_s / (2 * case.size / copy_s)
            for operation_s, copy_s in zip(taken[name], copies, strict=True)
        ]
        rows.append(
            asdict(case)
            | {
                "operation": name,
                "ms": 1e3 * statistics.median(taken[name]),
                "gb_s": moved / statistics.median(taken[name]) / 1e9,
                "of_memcpy": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "memcpy_gb_s": 2 * case.size / statistics.median(copies) / 1e9,
            }
        )
    return rows


def size_of(text: str) -> int:
    """The bytes that ``64M`` and the like stand for."""
    number, unit = text[:-1], text[-1:].upper()
    if not number.isdigit() or unit not in SIZES or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no size: give 4K, 64M or 1G.")
    return int(number) * SIZES[unit]


def name_of(size: int) -> str:
    """The text that stands for so many bytes, like ``64M``."""
    unit, unit_bytes = next((u, n) for u, n in reversed(SIZES.items()) if size >= n)
    return f"{size // unit_bytes}{unit}"


def listed(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Comma-separated values of a flag."""
    return lambda text: [item(part) for part in text.split(",")]


def one_of(allowed: tuple[str, ...]) -> Callable[[str], str]:
    """A name among those ``allowed``."""

    def check(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(
                f"{text} is unknown: give some of {', '.join(allowed)}."
            )
        return text

    return check


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=listed(int), default=[8, 4, 2], help="of 2 to 8")
    parser.add_argument("--rounding", type=listed(one_of(ROUNDINGS)), default=list(ROUNDINGS))
    parser.add_argument("--size", type=listed(size_of), default=[64 << 20], help="of the values")
    parser.add_argument("--threads", type=listed(int), default=[1])
    parser.add_argument("--levels", choices=LEVELS, default="uniform")
    parser.add_argument(
        "--dtype", type=listed(one_of(tuple(DTYPES))), default=["fp32"], help="fp32, bf16, fp16"
    )
    parser.add_argument("--bucket", type=int, default=1024)
    parser.add_argument("--zeros", type=float, default=0.0, help="fraction of values that are 0")
    parser.add_argument(
        "--kernels", type=listed(str), default=[native.capability()], help="see qsdp.ops.native"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    arguments = parser.parse_args()

    described = machine.describe()
    print(machine.one_line(described))
    print(f"{arguments.levels} levels, buckets of {arguments.bucket}")
    print(f"{'kernels':8}{'threads':>7} {'operation':11}{'size':>5} {'dtype':5}{'bits':>5}", end="")
    print(f" {'rounding':11}{'ms':>9}{'GB/s':>8}{'of memcpy':>11}  spread")
    rows, missed = [], 0
    for kernels, threads, size, dtype, bits, rounding in itertools.product(
        arguments.kernels,
        arguments.threads,
        arguments.size,
        arguments.dtype,
        arguments.bits,
        arguments.rounding,
    ):
        case = Case(
            kernels=kernels,
            threads=threads,
            size=size,
            dtype=dtype,
            bits=bits,
            rounding=rounding,
        )
        for row in measure(case, arguments):
            rows.append(row)
            limit, verdict = case.at_least(), ""
            if limit is not None and arguments.levels == "uniform":
                verdict = f"  at least {limit}: "
                verdict += "met" if row["of_memcpy"] >= limit else "MISSED"
                missed += row["of_memcpy"] < limit
            print(
                f"{case.kernels:8}{case.threads:7} {row['operation']:11}{name_of(case.size):>5} "
                f"{case.dtype:5}{case.bits:5} {case.rounding:11}{row['ms']:9.3f}"
                f"{row['gb_s']:8.2f}{row['of_memcpy']:11.2f}  "
                f"{row['spread'][0]:.2f}-{row['spread'][1]:.2f}{verdict}",
                flush=True,
            )
    if arguments.json is not None:
        record = {"machine": described, "levels": arguments.levels, "bucket": arguments.bucket}
        record |= {"zeros": arguments.zeros, "rows": rows}
        write_json(arguments.json, record)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
