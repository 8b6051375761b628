"""What tests of kernels give to them, and what they ask of what comes back."""

from __future__ import annotations

import torch
from torch import Tensor

CANARY = 0xC5


def hard_values(numel: int, generator: torch.Generator) -> Tensor:
    """fp32 [numel]: stretches of every kind of value that a bucket may hold."""
    x = torch.randn(numel, generator=generator)
    start = 0
    while start < numel:
        length = int(torch.randint(1, 200, (), generator=generator))
        part = x[start : start + length]
        kind = int(torch.randint(0, 12, (), generator=generator))
        if kind == 0:
            part.fill_(float(torch.randn((), generator=generator)))
        elif kind == 1:
            part[torch.rand(part.shape, generator=generator) < 0.6] = 0.0
        elif kind == 2:
            part[torch.rand(part.shape, generator=generator) < 0.3] = -0.0
        elif kind == 3:
            part.fill_(0.0)
        elif kind == 4:
            part.mul_(1e-40)
        elif kind == 5:
            part.mul_(3e38).clamp_(-3.4e38, 3.4e38)
        elif kind == 6:
            part.mul_(2.0**114)
        elif kind == 7 and float(torch.rand((), generator=generator)) < 0.3:
            part[0] = (torch.nan, torch.inf, -torch.inf)[start % 3]
        elif kind == 8:
            part.abs_().add_(1e-3)
        elif kind == 9:
            part.mul_(1e-3)
        elif kind == 10:
            part.mul_(2.0**-126)
        start += length
    return x


def off_by(num_bytes: int, offset: int) -> tuple[Tensor, Tensor]:
    """uint8 [num_bytes] at an odd address inside canaries, and the whole."""
    whole = torch.full((num_bytes + 256,), CANARY, dtype=torch.uint8)
    return whole[64 + offset : 64 + offset + num_bytes], whole


def assert_canaries(whole: Tensor, inner: Tensor) -> None:
    start = inner.storage_offset()
    assert (whole[:start] == CANARY).all()
    assert (whole[start + inner.numel() :] == CANARY).all()


def assert_same_values(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Bit for bit, except that a NaN equals a NaN."""
    got, want = got.clone().view(dtype), want.clone().view(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    integer = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    got, want = got.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0)
    assert torch.equal(got.view(integer), want.view(integer))
