"""How fast are the CPU kernels of changed codes (gather="delta"), beside dither at the same bits?

    python -m benchmarks.codec.changed_codes
    python -m benchmarks.codec.changed_codes --bits 8 --changed 0 0.1 0.26 --kernels scalar avx2

A row is kept of random values in buckets of 128, and brought up to values of which a share of the
codes are other ones; 1 in 200 buckets draws its grid again. Every round times each operation in
turn: encode and decode of all values by dither, in buckets as large; encode_changes, beside encode;
decode of the kept row, and apply_changes, which comes before it, beside decode. The fraction is the
median over rounds of (seconds of encode or decode) / (seconds, same round): 1 is as fast. Seconds
are the thread's processor time.

Exits with status 1 where encode_changes is below 0.9, or decode of kept rows below 0.95.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.support import machine
from benchmarks.support.asked import check_each_least, check_least
from benchmarks.support.runs import Mistake, ends_on_error
from qsdp import ops
from qsdp.codec.change_frame import most_body_bytes
from qsdp.codec.payload import Layout, Segment
from qsdp.codec.segment_table import SegmentRow
from qsdp.common.dtypes import DType
from qsdp.common.json_files import write_json
from qsdp.common.rounding import Rounding
from qsdp.ops import native
from qsdp.ops.reference.changes import TRAINED

BUCKET, EVERY, ROOM, KEY = 128, 200, 0.25, 7
COMPARED = {
    "encode_changes": ("encode", 0.9),
    "decode kept": ("decode", 0.95),
    "apply_changes": ("decode", None),
}
"""What each operation is held against, and which fraction it is to reach."""
TYPICAL = 0.26
"""Share of 8-bit codes that change in a step where the rate is highest (docs/delta.md).

With a bit less a grid is twice as coarse, and half as many change.
"""


class Row:
    """A kept row that nobody has sent, of so many values."""

    def __init__(self, bits: int, numel: int) -> None:
        layout = layout_of(bits, numel, keeps_epochs=True)
        self.table = torch.tensor(layout.table([numel]))
        self.bytes = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
        segment = SegmentRow(self.table[0].tolist())
        self.grids = segment.meta(self.bytes).view(torch.float32).view(-1, 2)
        self.grids[:, 0] = torch.nan
        self._frame = torch.zeros(most_body_bytes([segment]), dtype=torch.uint8)
        self._counts, self._modes = torch.zeros(3, dtype=torch.int64), torch.tensor([TRAINED])

    def frame(self, values: Tensor, step: int) -> tuple[Tensor, int]:
        """What brings the row up to ``values``, and how many codes that changes."""
        self.encode(values, step)
        return self._frame[: int(self._counts[0])].clone(), int(self._counts[1])

    def encode(self, values: Tensor, step: int) -> None:
        """``encode_changes`` of ``values``."""
        given = (values.view(torch.uint8), self.table, KEY, self.bytes, self._modes)
        ops.encode_changes(*given, step, EVERY, ROOM, self._frame, self._counts)

    def apply(self, frame: Tensor, step: int) -> None:
        """``apply_changes`` of a frame."""
        ops.apply_changes(frame, self.table, step, self.bytes)


def layout_of(bits: int, numel: int, keeps_epochs: bool) -> Layout:
    """That of a payload, or of a kept row, of one segment."""
    segment = Segment(
        bits=bits,
        dtype=DType.FP32,
        padded=numel,
        parameter=3,
        bucket=BUCKET,
        rounding=Rounding.DITHER,
        keeps_epochs=keeps_epochs,
    )
    return Layout([segment], group=0)


def operations(
    bits: int, numel: int, changed: float
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """A call of each operation, and what of the row is said of all of them."""
    row, other = Row(bits, numel), Row(bits, numel)
    before = torch.randn(numel)
    row.apply(row.frame(before, 0)[0], 0)
    # On a dithered grid a value passes a border in the share of cases that it moves of a step.
    moves = torch.randn(numel) * changed * (torch.pi / 2) ** 0.5
    values = before + moves * row.grids[:, 1].abs().repeat_interleave(BUCKET)[:numel]
    there, num_changed = row.frame(values, 1)
    other.bytes.copy_(row.bytes)
    other.apply(there, 1)
    back, _ = other.frame(before, 1)

    def apply_both() -> None:
        other.apply(back, 1)
        other.apply(there, 1)

    plain = layout_of(bits, numel, keeps_epochs=False)
    table, header = torch.tensor(plain.table([numel])), plain.header(0, 0)
    payload, target = torch.zeros(plain.payload_bytes).byte(), torch.zeros(4 * numel).byte()
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: ops.encode(values.view(torch.uint8), table, KEY, header, payload),
        "encode_changes": lambda: row.encode(values, 1),
        "decode": lambda: ops.decode(payload, table, KEY, target),
        "decode kept": lambda: ops.decode(row.bytes, row.table, KEY, target),
        "apply_changes": apply_both,
    }
    return calls, {"changed": num_changed / numel, "bits_a_value": 8 * len(there) / numel}


def measure(bits: int, changed: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each operation."""
    calls, found = operations(bits, arguments.values, changed)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.rounds + 1):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            taken[name].append((time.thread_time() - start) / (1 + (name == "apply_changes")))
    rows = []
    for name, (of, at_least) in COMPARED.items():
        ratios = [a / b for a, b in zip(taken[of][1:], taken[name][1:], strict=True)]
        rows.append(
            {
                "kernels": native.capability(),
                "bits": bits,
                **found,
                "operation": name,
                "ms": 1e3 * statistics.median(taken[name][1:]),
                "of": of,
                "fraction": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "at_least": at_least,
            }
        )
    return rows


def main() -> None:
    arguments = parse()
    with ends_on_error():
        check(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    described = machine.describe()
    print(machine.one_line(described))
    print(f"{arguments.values} values in buckets of {BUCKET}, one thread")
    print(f"{'kernels':8}{'bits':>5}{'changed':>9}{'bits/value':>11}  {'operation':15}", end="")
    print(f"{'ms':>8}  of dither's  spread")
    rows = []
    for kernels, bits in itertools.product(arguments.kernels, arguments.bits):
        native.use(kernels)
        for changed in arguments.changed or [TYPICAL / 2 ** (8 - bits)]:
            for row in measure(bits, changed, arguments):
                rows.append(row)
                print(line(row), flush=True)
    if arguments.json is not None:
        write_json(arguments.json, {"machine": described, "values": arguments.values, "rows": rows})
    sys.exit(1 if any(is_missed(row) for row in rows) else 0)


def is_missed(row: dict[str, Any]) -> bool:
    """Whether an operation is slower than it is to be."""
    return row["at_least"] is not None and row["fraction"] < row["at_least"]


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    verdict, (least, most) = "", row["spread"]
    if row["at_least"] is not None:
        verdict = f"  at least {row['at_least']}: {'MISSED' if is_missed(row) else 'met'}"
    return (
        f"{row['kernels']:8}{row['bits']:5}{row['changed']:9.2%}{row['bits_a_value']:11.3f}  "
        f"{row['operation']:15}{row['ms']:8.2f}  {row['of']:7}{row['fraction']:5.2f}  "
        f"{least:.2f}-{most:.2f}{verdict}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", choices=range(2, 9), default=[4, 8])
    parser.add_argument(
        "--changed",
        type=float,
        nargs="+",
        help="shares of the codes; by default those of a training",
    )
    parser.add_argument("--values", type=int, default=16 << 20, help="in the row")
    parser.add_argument(
        "--kernels", nargs="+", choices=native.available(), default=[native.capability()]
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Raise Mistake for what cannot be measured."""
    check_least(arguments, {"values": BUCKET, "rounds": 1})
    check_each_least("--changed", arguments.changed or [], 0.0)
    if max(arguments.changed or [0.0]) > 1:
        raise Mistake(f"--changed is {arguments.changed}: give shares of 0 to 1.")


if __name__ == "__main__":
    main()
