"""Element types: those that the codec numbers, torch's, and those that flags name."""

from __future__ import annotations

from enum import IntEnum

import torch


class DType(IntEnum):
    """Element types of a flat buffer or of a raw segment; OPAQUE counts bytes."""

    FP32 = 0
    BF16 = 1
    FP16 = 2
    OPAQUE = 3


ITEM_BYTES = {DType.FP32: 4, DType.BF16: 2, DType.FP16: 2, DType.OPAQUE: 1}
TORCH_DTYPES = {
    DType.FP32: torch.float32,
    DType.BF16: torch.bfloat16,
    DType.FP16: torch.float16,
    DType.OPAQUE: torch.uint8,
}

CODEC_DTYPES = {torch.float32: DType.FP32, torch.bfloat16: DType.BF16, torch.float16: DType.FP16}
"""The types that are known to the codec; all others are opaque to it."""


def of_precision(name: str) -> torch.dtype:
    """The type that flags call fp32, bf16 or fp16."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
