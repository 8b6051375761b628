"""Magnitudes as integers that order alike: what a selection of the largest reads values through.

The key of a float is the bit pattern of its magnitude as fp32 (bf16 and fp16 values are fp32
values, so they may be mixed); NaN's are above infinity's. The key of an int64, which must not be
negative, is itself.

``count_digits`` counts some bits of the keys, ``mark_above`` marks those above a key. This is the
specification in plain PyTorch, and serves GPUs without waiting for them; csrc/ gives the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The floats that have keys."""
KEY_BITS = 31
"""Bits of a float's key."""
DIGIT_BITS = 11
NUM_BINS = 1 << DIGIT_BITS

# Intermediate results of a chunk stay in a CPU's cache; a GPU wants few launches instead.
_CHUNK_CPU = 1 << 18
_CHUNK_GPU = 1 << 24


def keys_of(values: Tensor) -> Tensor:
    """The integer keys by which magnitudes of ``values`` are ordered: int32 for floats."""
    if values.dtype == torch.int64:
        return values
    return values.float().contiguous().view(torch.int32) & 0x7FFFFFFF


def count_digits(values: Tensor, prefix: Tensor, shift: int, width: int, counts: Tensor) -> None:
    """The reference of ``count_digits``: count ``width`` bits of the magnitudes' keys.

    They are those below bit ``shift + width`` of the keys that begin with ``prefix``.

    Args:
        values: Contiguous, 1-D; float32, bfloat16, float16 or int64.
        prefix: int64, one value, on any device where this runs for a GPU: the keys' bits from
            ``shift + width`` on.
        shift, width: How many low bits are left out, and how many are counted, 1 to 11; together at
            most 63.
        counts: int64 [2048], added to in place.
    """
    _check_magnitudes(values)
    if not (0 <= shift and 1 <= width <= DIGIT_BITS and shift + width <= 63):
        raise ValueError(f"cannot count {width} bits from bit {shift} on: give 1 to 11 below 63.")
    if prefix.dtype != torch.int64 or prefix.numel() != 1:
        raise ValueError(
            f"the prefix is {prefix.dtype} of {prefix.numel()} values: give one int64."
        )
    if counts.dtype != torch.int64 or counts.shape != (NUM_BINS,) or not counts.is_contiguous():
        raise ValueError(
            f"the counts are {counts.dtype} of shape {tuple(counts.shape)}: give contiguous int64 "
            f"[{NUM_BINS}]."
        )
    on_cpu = values.device.type == "cpu"
    for chunk in values.split(_CHUNK_CPU if on_cpu else _CHUNK_GPU):
        keys = keys_of(chunk).long()
        matches = (keys >> (shift + width)) == prefix.to(keys.device)
        digits = (keys >> shift) & ((1 << width) - 1)
        if on_cpu:
            counts += torch.bincount(digits[matches], minlength=NUM_BINS)
            continue
        # bincount and a boolean index would wait for their sizes. histc leaves out what is below
        # its range, and its arithmetic is exact for int32.
        digits = torch.where(matches, digits, -1).int()
        counts += torch.histc(digits, bins=NUM_BINS, min=0, max=NUM_BINS).to(counts)


def mark_above(values: Tensor, key: int, out: Tensor) -> None:
    """The reference of ``mark_above``: which magnitudes have keys above ``key``, into ``out``.

    Args:
        values: Contiguous, 1-D; float32, bfloat16, float16 or int64.
        key: From -1, which marks all.
        out: bool, contiguous, of the shape of ``values``; overwritten.
    """
    _check_magnitudes(values)
    if out.dtype != torch.bool or out.shape != values.shape or not out.is_contiguous():
        raise ValueError(
            f"the marks are {out.dtype} of shape {tuple(out.shape)}: give contiguous bool of shape "
            f"{tuple(values.shape)}."
        )
    keys = keys_of(values)
    torch.gt(keys, min(key, torch.iinfo(keys.dtype).max), out=out)


def _check_magnitudes(values: Tensor) -> None:
    dtypes = (*DTYPES, torch.int64)
    if values.dtype not in dtypes or values.dim() != 1 or not values.is_contiguous():
        raise ValueError(
            f"the values are {values.dtype} of shape {tuple(values.shape)}: give contiguous 1-D "
            "fp32, bf16, fp16 or int64."
        )
