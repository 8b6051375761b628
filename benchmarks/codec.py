"""Encode and decode throughput of the codec against memcpy, on one core.

Bytes moved are those of the values read or written plus those of the payload written or read;
adding reads its target too; memcpy reads and writes. Every round times one memcpy and one call of
each measured operation, so that a noisy neighbour slows all of them alike; the ratio printed is the
median over rounds of (bytes per second moved) / (memcpy's bytes per second moved, same round).
Times are the thread's processor time: on a shared machine, waiting for a core does not count.

    python benchmarks/codec.py --bits 4,8 --rounding shift,dither
    python benchmarks/codec.py --bits 3,4,6 --rounding stochastic,nearest --levels learned
"""

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import torch

from qsdp.codec import native
from qsdp.codec.levels import uniform_levels
from qsdp.codec.payload import DType, Layout, Segment
from qsdp.config import LEVELS, ROUNDINGS

DTYPES = {"fp32": DType.FP32, "bf16": DType.BF16, "fp16": DType.FP16}
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One measured call: ``moved_bytes`` a call."""

    name: str
    moved_bytes: int
    call: Callable[[], object]


def operations(
    dtype: str, bits: int, rounding: str, arguments: argparse.Namespace
) -> list[Operation]:
    """Encode, decode and (fp32) decode-and-add of one segment of random values."""
    item = TORCH_DTYPES[dtype].itemsize
    numel = arguments.mib * 2**20 // 4
    segment = Segment(
        bits=bits,
        dtype=DTYPES[dtype],
        padded=numel,
        parameter=3,
        bucket=arguments.bucket,
        rounding=ROUNDINGS.index(rounding),
        levels=0 if arguments.levels == "learned" else -1,
    )
    levels = uniform_levels(bits).square()
    layout = Layout([segment], group=0)
    table = torch.tensor(layout.table([numel]))
    values = torch.randn(numel)
    if arguments.zeros:
        values.masked_fill_(torch.rand(numel) < arguments.zeros, 0.0)
    buffer = values.to(TORCH_DTYPES[dtype]).view(torch.uint8)
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    target = torch.zeros_like(buffer)
    header, moved = layout.header(0, 0), numel * item + layout.payload_bytes
    encode, decode = torch.ops.qsdp.encode.default, torch.ops.qsdp.decode.default
    encode(buffer, table, 7, header, payload, levels)
    rows = [
        Operation(
            name="encode",
            moved_bytes=moved,
            call=lambda: encode(buffer, table, 7, header, payload, levels),
        ),
        Operation(
            name="decode",
            moved_bytes=moved,
            call=lambda: decode(payload, table, 7, target, False, levels),
        ),
    ]
    if dtype == "fp32":
        rows.append(
            Operation(
                name="decode-add",
                moved_bytes=moved + numel * item,
                call=lambda: decode(payload, table, 7, target, True, levels),
            )
        )
    return rows


def seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64, help="MiB of fp32 values (bf16: half)")
    parser.add_argument("--bits", default="8,4,2", help="of 2 to 8")
    parser.add_argument("--rounding", default="shift,dither,stochastic,nearest")
    parser.add_argument("--levels", choices=LEVELS, default="uniform")
    parser.add_argument("--dtype", default="fp32", help="of fp32, bf16, fp16")
    parser.add_argument("--bucket", type=int, default=1024)
    parser.add_argument("--zeros", type=float, default=0.0, help="fraction of values that are 0")
    parser.add_argument("--kernels", default=native.capability(), help="see qsdp.codec.native")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    num_bytes = arguments.mib * 2**20
    source = torch.randn(num_bytes // 4)
    copied = torch.zeros_like(source)

    def memcpy() -> None:
        ctypes.memmove(copied.data_ptr(), source.data_ptr(), num_bytes)

    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}"
    )
    print(f"{arguments.mib} MiB of fp32 values, buckets of {arguments.bucket}")
    print(f"{arguments.levels} levels")
    print(f"medians of {arguments.rounds} rounds of one thread's processor time")
    print(
        "GB/s: bytes of values and of payload moved; x memcpy: the same by memcpy's, read + written"
    )
    print(f"{'kernels':8}{'operation':12}{'dtype':6}{'bits':>4} {'rounding':11}", end="")
    print(f"{'ms':>8}{'GB/s':>8}{'x memcpy':>10}")
    for kernels in arguments.kernels.split(","):
        native.use(kernels)
        for dtype in arguments.dtype.split(","):
            for bits in map(int, arguments.bits.split(",")):
                for rounding in arguments.rounding.split(","):
                    rows = operations(dtype, bits, rounding, arguments)
                    times: list[list[float]] = [[] for _ in rows]
                    ratios: list[list[float]] = [[] for _ in rows]
                    for row in rows:
                        row.call()
                    for _ in range(arguments.rounds):
                        copy_rate = 2 * num_bytes / seconds(memcpy)
                        for i, row in enumerate(rows):
                            times[i].append(seconds(row.call))
                            ratios[i].append(row.moved_bytes / times[i][-1] / copy_rate)
                    for i, row in enumerate(rows):
                        median_s = statistics.median(times[i])
                        print(
                            f"{kernels:8}{row.name:12}{dtype:6}{bits:4} {rounding:11}"
                            f"{median_s * 1e3:8.2f}{row.moved_bytes / median_s / 1e9:8.2f}"
                            f"{statistics.median(ratios[i]):10.2f}",
                            flush=True,
                        )
    copy_s = statistics.median(seconds(memcpy) for _ in range(arguments.rounds))
    print(f"memcpy: {copy_s * 1e3:.2f} ms, {2 * num_bytes / copy_s / 1e9:.2f} GB/s moved")


if __name__ == "__main__":
    main()
