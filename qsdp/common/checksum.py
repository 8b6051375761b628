"""Whether tensors are still what they were.

torch's counters of versions miss collectives, and what ``torch._foreach_*`` does to DTensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

_CHUNK = 1 << 22


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number that other contents of ``tensors`` would hardly have.

    The tensors are of any types, on one kind of device. It works at about the speed of memory. On
    CPUs it is a CRC of 32 bits; elsewhere words of 32 bits, each times an odd random number of its
    place, summed modulo 2**64.
    """
    total = 0
    for tensor in tensors:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        total = (
            zlib.crc32(raw.numpy().data, total)
            if raw.device.type == "cpu"
            else _add_on_device(total, raw)
        )
    return total


def _add_on_device(total: int, raw: Tensor) -> int:
    rest = -raw.numel() % 4
    if rest or raw.storage_offset() % 4:
        raw = torch.nn.functional.pad(raw, (0, rest)).clone()
    factors = _factors(raw.device)
    chunks = raw.view(torch.int32).split(_CHUNK)
    sums = [(chunk * factors[: chunk.numel()]).sum() for chunk in chunks]
    for part in torch.stack(sums).tolist() if sums else ():
        total = (total * 0x5851F42D4C957F2D + part) % (1 << 64)
    return total


@cache
def _factors(device: torch.device) -> Tensor:
    """int64 [_CHUNK], odd random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        odd = torch.randint(-(1 << 62), 1 << 62, (_CHUNK,), generator=generator) | 1
        return odd.to(device)
