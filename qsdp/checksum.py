"""Whether tensors are still what they were: torch's counters of versions miss collectives, and what
`torch._foreach_*` does to DTensors."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

_CHUNK_CPU = 1 << 15  # stays in a CPU's cache; a GPU wants few launches instead
_CHUNK_GPU = 1 << 22
_FACTOR = 0x5851F42D4C957F2D


def checksum(tensors: Iterable[Tensor]) -> int:
    """64 bits of the contents of ``tensors``, of any dtypes, at about the speed of memory: words of
    32 bits, each times an odd random number of its place, summed modulo 2**64."""
    total = 0
    for tensor in tensors:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        rest = -raw.numel() % 4
        if rest or raw.storage_offset() % 4:
            raw = torch.nn.functional.pad(raw, (0, rest)).clone()
        words = raw.view(torch.int32)
        factors = _factors(words.device)
        products = torch.empty_like(factors[: words.numel()])
        sums = []
        for chunk in words.split(factors.numel()):
            room = products[: chunk.numel()]
            sums.append(torch.mul(chunk, factors[: chunk.numel()], out=room).sum())
        for part in torch.stack(sums).tolist() if sums else ():
            total = (total * _FACTOR + part) % (1 << 64)
    return total


@cache
def _factors(device: torch.device) -> Tensor:
    """Odd int64, one a place in a chunk."""
    generator = torch.Generator().manual_seed(0)
    size = _CHUNK_CPU if device.type == "cpu" else _CHUNK_GPU
    with torch.inference_mode(False):
        odd = torch.randint(-(1 << 62), 1 << 62, (size,), generator=generator) | 1
        return odd.to(device)
