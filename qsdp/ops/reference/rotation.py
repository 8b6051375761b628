"""[Note: Rotation] A signed Hadamard transform of gradients, block by block, before their codes.

    bucket     each stretch of a buffer is cut into buckets, as its codes are
    block      a bucket is cut into blocks of 256 values, and what is left of it into blocks of
               powers of two, the largest first: 37 values are 32, 4 and 1
    signs      of a block's values, and of what they become, those change sign whose number in the
               block has an odd number of pairs of neighbouring bits 1: 3, 6, 11, 12, 13, ...
               (Rudin and Shapiro's sequence)
    sums       in between, for h = 1, 2, 4, ... below the block's size, the values at i and i + h,
               where i has no bit h, become their sum and their difference, first less second, in
               fp32. In the end all are multiplied by the fp32 next to 1 / sqrt(size)
    rounding   halves are read as fp32 and rounded to nearest even, once, in the end; a NaN becomes
               the canonical one

A bucket of gradients is heavy-tailed: few values say its range, and with it the step of its grid.
What it is transformed to are sums of all of them, nearly normal, whose range is smaller. The signs
keep what neighbours have in common, as the values of one row have, from adding up in a few of the
sums: in a block of 256 the transform of any row of the Hadamard matrix under these signs is flat.
The transform is linear, orthogonal and its own inverse, so that sums of transformed gradients, once
transformed back, are sums of gradients, and errors stay as large as they were made. SDP4Bit (arXiv
2410.15526) sends gradients so; the idea is QuaRot's (arXiv 2404.00456). Nothing is random. Where a
value of a block is not finite none is, nor where sums overflow: in fp16 those of gradients that are
all below 4094 do not.

This is the specification in plain PyTorch; csrc/ gives the same bytes.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from qsdp.common.dtypes import ITEM_BYTES, TORCH_DTYPES, DType
from qsdp.ops.reference.packing import convert_values

MOST_BLOCK = 256
"""Values of the largest block."""


class RotatedStretch(IntEnum):
    """Columns of the int64 table of stretches that are rotated in one buffer."""

    BYTE = 0  # where the stretch starts in the buffer
    NUMEL = 1  # values; what lies behind them stays as it is
    BUCKET = 2  # values a bucket, a multiple of 8; blocks do not reach across
    DTYPE = 3  # of the values: fp32, bf16 or fp16


def rotate(buffer: Tensor, stretches: Tensor) -> None:
    """The reference of ``rotate``: transform the stretches of ``buffer`` in place, or back.

    Args:
        buffer: uint8 [bytes], contiguous, at any address.
        stretches: int64 [stretches, len(RotatedStretch)] on the CPU, in the order of the buffer,
            where no two overlap.

    Raises:
        ValueError: The stretches do not fit the buffer.
    """
    for row in _checked_rows(buffer, stretches):
        dtype = TORCH_DTYPES[DType(row[RotatedStretch.DTYPE])]
        own = buffer.narrow(0, row[RotatedStretch.BYTE], row[RotatedStretch.NUMEL] * dtype.itemsize)
        values = rotated(own.clone().view(dtype).float(), row[RotatedStretch.BUCKET])
        own.copy_(convert_values(values, dtype).view(torch.uint8))


def rotated(values: Tensor, bucket: int) -> Tensor:
    """The transform of fp32 [n] ``values`` in buckets of ``bucket``: a new tensor."""
    out = values.clone()
    num_whole = values.numel() // bucket * bucket
    for part in (out[:num_whole].view(-1, bucket), out[num_whole:].view(1, -1)):
        size, start = part.shape[1], 0
        num_blocks = size // MOST_BLOCK
        sizes = [(MOST_BLOCK, num_blocks)]
        rest = size % MOST_BLOCK
        sizes += [(1 << bit, 1) for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
        for block, count in sizes:
            own = part[:, start : start + block * count]
            own.copy_(_transformed(own.reshape(-1, block)).view(own.shape))
            start += block * count
    return out


def _transformed(blocks: Tensor) -> Tensor:
    """The transform of each row, fp32 [rows, a power of two]."""
    num_rows, size = blocks.shape
    signs = _signs(size, blocks.device)
    blocks = blocks * signs
    h = 1
    while h < size:
        first, second = blocks.reshape(num_rows, size // (2 * h), 2, h).unbind(2)
        blocks = torch.stack([first + second, first - second], dim=2)
        h *= 2
    scaled = blocks.reshape(num_rows, size) * size**-0.5 * signs
    return scaled.masked_fill_(scaled.isnan(), torch.nan)


@lru_cache
def _signs(size: int, device: torch.device) -> Tensor:
    """fp32 [size], 1 and -1: the signs of a block's values."""
    odd = [(i & i >> 1).bit_count() % 2 for i in range(size)]
    return torch.tensor([1.0 - 2.0 * each for each in odd], device=device)


def _checked_rows(buffer: Tensor, stretches: Tensor) -> list[list[int]]:
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise ValueError(
            f"the buffer is {buffer.dtype} of shape {tuple(buffer.shape)}: "
            "give a contiguous 1-D uint8 view."
        )
    if (stretches.dtype, stretches.device.type, stretches.dim()) != (torch.int64, "cpu", 2):
        raise ValueError(
            f"the stretches are {stretches.dtype} of shape {tuple(stretches.shape)} on "
            f"{stretches.device}: give int64 rows on the cpu."
        )
    if stretches.shape[1] != len(RotatedStretch):
        raise ValueError(
            f"the stretches have {stretches.shape[1]} columns: give {len(RotatedStretch)}."
        )
    rows: list[list[int]] = stretches.tolist()
    end = 0
    for byte, numel, bucket, dtype in rows:
        if dtype not in (DType.FP32, DType.BF16, DType.FP16) or bucket < 8 or bucket % 8:
            raise ValueError(
                f"a stretch has DTYPE {dtype} and buckets of {bucket}: give 0 to 2 and a positive "
                "multiple of 8."
            )
        num_bytes = numel * ITEM_BYTES[DType(dtype)]
        if byte < end or numel < 0 or byte + num_bytes > buffer.numel():
            raise ValueError(
                f"a stretch of {numel} values at byte {byte} reaches outside the buffer, or into "
                "the one before: give stretches in the order of the buffer."
            )
        end = byte + num_bytes
    return rows
