"""Whether this device's kernels of the codec make the bytes of the specification."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qsdp.codec.change_frame import most_body_bytes
from qsdp.codec.payload import Layout, Segment
from qsdp.codec.random_numbers import KeyDirection, KeyStage, RandomKey
from qsdp.codec.segment_table import SegmentRow
from qsdp.common.dtypes import TORCH_DTYPES, DType
from qsdp.common.rounding import Rounding
from qsdp.config import CODED_BITS
from qsdp.ops import native
from qsdp.ops.reference.changes import TRAINED
from qsdp.ops.schema import KERNELS
from qsdp.train.world import World

_REFERENCE: Any = SimpleNamespace(**KERNELS)


class Failed(Exception):
    """A promise that does not hold on this rank."""


def check_codec(world: World) -> str:
    """Bits 2 to 8, all roundings, three dtypes: equal bytes and equal values."""
    count = 0
    for bits in CODED_BITS:
        for rounding in Rounding:
            for dtype in (DType.FP32, DType.BF16, DType.FP16):
                segment = Segment(
                    bits=bits, dtype=dtype, padded=5000, parameter=3, rounding=rounding
                )
                layout = Layout([segment], group=1)
                table = torch.tensor(layout.table([4993]))
                values = torch.randn(5000, generator=torch.Generator().manual_seed(count))
                values[::97] = 0.0
                values = values.to(TORCH_DTYPES[dtype])
                key = RandomKey(0, count, KeyDirection.GATHER, KeyStage.FLAT, 0, world.rank).fold()
                expected, back = _encode_and_decode(_REFERENCE, values, layout, table, key)
                found, found_back = _encode_and_decode(
                    torch.ops.qsdp, values.to(world.device), layout, table, key
                )
                told = f"{dtype.name} in {bits} bits by {rounding.label}"
                if not torch.equal(found.cpu(), expected):
                    raise Failed(f"{told} becomes other bytes than plain PyTorch's.")
                if not torch.equal(found_back.cpu(), back):
                    raise Failed(f"{told} becomes other values than plain PyTorch's.")
                count += 1
    return f"{count} combinations, {native.remark(world.device)}"


def check_changes(world: World) -> str:
    """Bits 2 to 8, some steps of weights that move: equal frames, and rows that follow them."""
    kinds: list[Any] = [_REFERENCE, torch.ops.qsdp]
    num_bytes = 0
    for bits in CODED_BITS:
        segment = Segment(
            bits=bits,
            dtype=DType.FP32,
            padded=5000,
            parameter=3,
            bucket=128,
            rounding=Rounding.DITHER,
            keeps_epochs=True,
        )
        layout = Layout([segment], group=1)
        table = torch.tensor(layout.table([4993]))
        values = torch.randn(5000, generator=torch.Generator().manual_seed(bits))
        key = RandomKey(0, 0, KeyDirection.KEPT, KeyStage.FLAT, 0, world.rank).fold()
        row = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
        SegmentRow(table[0].tolist()).meta(row).view(torch.float32)[::2] = torch.nan
        rows = [row, row.to(world.device, copy=True)]
        for step in range(4):
            frames = []
            for kernels, kept in zip(kinds, rows, strict=True):
                frame = _changes(kernels, values.to(kept.device), table, key, kept, step)
                kernels.apply_changes(frame, table, step, kept)
                frames.append(frame.cpu())
            if not torch.equal(*frames) or not torch.equal(rows[0], rows[1].cpu()):
                raise Failed(f"changes in {bits} bits become other bytes than plain PyTorch's.")
            num_bytes += frames[0].numel()
            values += 0.02 * values.roll(1)
    return f"{num_bytes} bytes"


def _changes(
    kernels: Any, values: Tensor, table: Tensor, key: int, row: Tensor, step: int
) -> Tensor:
    frame = torch.empty(
        most_body_bytes([SegmentRow(table[0].tolist())]), dtype=torch.uint8, device=row.device
    )
    counts, modes = torch.zeros(3, dtype=torch.int64), torch.tensor([TRAINED])
    values = values.view(torch.uint8)
    kernels.encode_changes(values, table, key, row, modes, step, 3, 0.25, frame, counts)
    return frame[: int(counts[0])]


def _encode_and_decode(
    kernels: Any, values: Tensor, layout: Layout, table: Tensor, key: int
) -> tuple[Tensor, Tensor]:
    payload = torch.empty(layout.payload_bytes, dtype=torch.uint8, device=values.device)
    kernels.encode(values.view(torch.uint8), table, key, layout.header(0, 0), payload)
    back = torch.empty_like(values)
    kernels.decode(payload, table, key, back.view(torch.uint8), False)
    return payload, back.view(torch.uint8)
