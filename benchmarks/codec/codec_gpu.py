"""Encode and decode throughput of the CUDA kernels, against a large copy on the same GPU.

    python -m benchmarks.codec.codec_gpu --json codec_gpu.json

Bytes moved are those of the values read or written plus those of the payload written or read;
adding reads its target too; a copy reads and writes. Every round times a copy of 1 GiB and a batch
of calls of each operation by events of the stream; the fraction is the median over rounds of (bytes
a second moved) / (the copy's, same round). A batch goes round as many buffers as fill twice the L2
cache. Copies of the other sizes stand beside: a launch and its end cost these, too. Of small sizes
the microseconds a call stand beside those of a launch that does nothing else than write 32 bytes,
calls following one another: the host's work shows, as it does in training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import machine
from qsdp.codec.payload import Layout, Segment
from qsdp.common.dtypes import CODEC_DTYPES, DType
from qsdp.common.json_files import write_json
from qsdp.common.rounding import Rounding
from qsdp.ops import native

DTYPES = {kind.name.lower(): (kind, dtype) for dtype, kind in CODEC_DTYPES.items()}
BUCKETS = {8: 1024, 7: 1024}
OTHER_BUCKET = 128  # qsdp's default for weights below 7 bits
AT_LEAST = {8: 0.85, 4: 0.80}
"""The fraction of the copy's bytes a second to reach: for fp32 and shifts from 64 MiB on."""
COPY_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    mib: int
    dtype: str
    bits: int
    rounding: str


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Every size with the main settings; every dtype, width and rounding at 64 MiB."""
    found = [
        Case(mib=mib, dtype="fp32", bits=bits, rounding="shift")
        for mib in arguments.mib
        for bits in (8, 4)
    ]
    found += [
        Case(mib=64, dtype=dtype, bits=bits, rounding="shift")
        for dtype in DTYPES
        for bits in (8, 6, 4, 3, 2)
    ]
    found += [
        Case(mib=64, dtype="fp32", bits=bits, rounding=rounding)
        for bits in (8, 4)
        for rounding in ("dither", "stochastic")
    ]
    return list(dict.fromkeys(found))


def operations(case: Case) -> dict[str, tuple[int, Callable[[int], object]]]:
    """The bytes moved by a call, and call number i, of each operation."""
    kind, dtype = DTYPES[case.dtype]
    numel = case.mib * 2**20 // dtype.itemsize
    segment = Segment(
        bits=case.bits,
        dtype=kind,
        padded=numel,
        parameter=3,
        bucket=BUCKETS.get(case.bits, OTHER_BUCKET),
        rounding=Rounding.of(case.rounding),
    )
    layout = Layout([segment], group=0)
    table = torch.tensor(layout.table([numel]))
    header = layout.header(0, 0)
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(1, 2 * l2_bytes // (case.mib * 2**20) + 1)
    values = torch.randn(numel, device="cuda").to(dtype).view(torch.uint8)
    buffers = [values.clone() for _ in range(copies)]
    payloads = [
        torch.zeros(layout.payload_bytes, dtype=torch.uint8, device="cuda") for _ in range(copies)
    ]
    encode, decode = torch.ops.qsdp.encode.default, torch.ops.qsdp.decode.default
    for payload in payloads:
        encode(values, table, 7, header, payload)
    moved = values.numel() + layout.payload_bytes

    def at(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return buffers[i % copies], payloads[i % copies]

    found: dict[str, tuple[int, Callable[[int], object]]] = {
        "decode": (moved, lambda i: decode(at(i)[1], table, 7, at(i)[0])),
        "encode": (moved, lambda i: encode(at(i)[0], table, 7, header, at(i)[1])),
    }
    if case.dtype == "fp32":
        found["decode-add"] = (
            moved + values.numel(),
            lambda i: decode(at(i)[1], table, 7, at(i)[0], True),
        )
    return found


def seconds(call: Callable[[int], object], times: int) -> float:
    """Seconds of one call, by events around ``times`` of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(times):
        call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def measure(case: Case, rounds: int, copy: Callable[[int], object]) -> list[dict[str, Any]]:
    """A row for each operation."""
    found = operations(case)
    times = max(1, min(100, 512 // case.mib))
    for _, call in found.values():
        seconds(call, 3)
    taken: dict[str, list[float]] = {name: [] for name in found}
    ratios: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        copy_rate = 2 * COPY_BYTES / seconds(copy, 1)
        for name, (moved, call) in found.items():
            taken[name].append(seconds(call, times))
            ratios[name].append(moved / taken[name][-1] / copy_rate)
    return [
        vars(case)
        | {
            "operation": name,
            "us": 1e6 * statistics.median(taken[name]),
            "gb_s": moved / statistics.median(taken[name]) / 1e9,
            "of_copy": statistics.median(ratios[name]),
            "spread": [min(ratios[name]), max(ratios[name])],
        }
        for name, (moved, _) in found.items()
    ]


def copy_row(mib: int, rounds: int) -> dict[str, Any]:
    """A row for a plain copy of that size, as cases are measured."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    num_bytes = mib * 2**20
    buffers = [
        torch.full((2, num_bytes), 1, dtype=torch.uint8, device="cuda")
        for _ in range(max(1, 2 * l2_bytes // num_bytes + 1))
    ]

    def copy(i: int) -> object:
        target, source = buffers[i % len(buffers)]
        return target.copy_(source)

    times = max(1, min(100, 512 // mib))
    seconds(copy, 3)
    taken = statistics.median(seconds(copy, times) for _ in range(rounds))
    return {"mib": mib, "us": 1e6 * taken, "gb_s": 2 * num_bytes / taken / 1e9}


def launch_floor(rounds: int) -> float:
    """Seconds of an encode of nothing: one launch, which writes a header."""
    layout = Layout([Segment(bits=8, dtype=DType.FP32, padded=8, parameter=0)], group=0)
    table = torch.tensor(layout.table([0]))
    buffer = torch.zeros(layout.buffer_bytes, dtype=torch.uint8, device="cuda")
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8, device="cuda")
    encode, header = torch.ops.qsdp.encode.default, layout.header(0, 0)
    return statistics.median(
        seconds(lambda _: encode(buffer, table, 7, header, payload), 100) for _ in range(rounds)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 64, 256, 1024], help="sizes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    arguments = parser.parse_args()
    if not native.has_cuda_kernels():
        print(
            "error: this needs a GPU and CUDA kernels: run it where qsdp has both.", file=sys.stderr
        )
        sys.exit(2)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.ones_like(source)
    rows = []
    print(f"{'operation':11}{'MiB':>5} {'dtype':5}{'bits':>5} {'rounding':10}{'us':>9}", end="")
    print(f"{'GB/s':>8}{'of copy':>9}  spread")
    missed = 0
    for case in cases(arguments):
        for row in measure(case, arguments.rounds, lambda _: target.copy_(source)):
            rows.append(row)
            limit = AT_LEAST.get(case.bits)
            is_judged = limit is not None and case.mib >= 64 and case.dtype == "fp32"
            is_judged &= case.rounding == "shift"
            verdict = ""
            if is_judged:
                verdict = f"  at least {limit}: "
                verdict += "met" if row["of_copy"] >= limit else "MISSED"
                missed += row["of_copy"] < limit
            print(
                f"{row['operation']:11}{case.mib:5} {case.dtype:5}{case.bits:5} {case.rounding:10}"
                f"{row['us']:9.1f}{row['gb_s']:8.0f}{row['of_copy']:9.2f}  "
                f"{row['spread'][0]:.2f}-{row['spread'][1]:.2f}{verdict}",
                flush=True,
            )
    floor = launch_floor(arguments.rounds)
    copy_s = statistics.median(
        seconds(lambda _: target.copy_(source), 3) for _ in range(arguments.rounds)
    )
    print(f"an encode of no value: {1e6 * floor:.1f} us")
    print(f"a copy of 1 GiB: {2 * COPY_BYTES / copy_s / 1e9:.0f} GB/s moved")
    by_size = [copy_row(mib, arguments.rounds) for mib in arguments.mib]
    for row in by_size:
        print(f"copies of {row['mib']} MiB: {row['us']:.1f} us, {row['gb_s']:.0f} GB/s moved")
    described = machine.describe("cuda")
    print(machine.one_line(described))
    if arguments.json is not None:
        record = {"machine": described, "copy_gb_s": 2 * COPY_BYTES / copy_s / 1e9}
        record |= {"floor_us": 1e6 * floor, "copies": by_size, "rows": rows}
        write_json(arguments.json, record)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
