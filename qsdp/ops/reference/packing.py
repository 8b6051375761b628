"""What the reference kernels write of values and codes: other dtypes, streams of bits."""

from __future__ import annotations

import torch
from torch import Tensor


def convert_values(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The reference codec's conversion of ``values`` to ``dtype``, rounded to nearest even.

    A NaN becomes the canonical one, except where its bits are kept (bf16 in fp32).
    """
    if values.dtype == dtype or (values.dtype, dtype) == (torch.bfloat16, torch.float32):
        return values.to(dtype)
    return values.to(dtype).masked_fill(values.isnan(), torch.nan)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The reference codec's packing of uint8 [n] codes, as a little-endian bit stream.

    Returns uint8 [ceil(n * bits / 8)].
    """
    num_bytes = -(-codes.numel() * bits // 8)
    groups = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8).long()
    words = (groups << bits * torch.arange(8, device=codes.device)).sum(1)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[:num_bytes]


def unpack_codes(stream: Tensor, bits: int, num: int) -> Tensor:
    """The reference codec's unpacking: the ``num`` codes (uint8) that ``pack_codes`` packed."""
    groups = -(-num // 8)
    stream = torch.nn.functional.pad(stream, (0, groups * bits - stream.numel()))
    octets = torch.nn.functional.pad(stream.view(groups, bits), (0, 8 - bits)).contiguous()
    words = octets.view(torch.int64)
    codes = words >> bits * torch.arange(8, device=stream.device) & (1 << bits) - 1
    return codes.view(-1)[:num].to(torch.uint8)
