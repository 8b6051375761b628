"""What a device can do at best, to which a run's speed is compared."""

from __future__ import annotations

import math
import time

import torch

from qsdp.common.dtypes import of_precision

_SECONDS = 0.3
_NO_MEMORY = ("can't allocate memory", "ALLOC_FAILED")  # of the CPU's allocator, of cuBLAS


def matmul_flops_per_s(device: torch.device, precision: str) -> float:
    """The peak of ``device``, measured: FLOPs a second of products of square matrices.

    A data sheet's peak would need a table of devices and would be out of reach; this is what the
    same torch gets out of the same cores, so it is called on all ranks at the same time. Not a
    number where there is no memory left to measure it in.
    """
    try:
        return _time_products(device, precision)
    except (RuntimeError, MemoryError) as error:
        is_full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_full and not any(words in str(error) for words in _NO_MEMORY):
            raise
        return math.nan


def _time_products(device: torch.device, precision: str) -> float:
    size = 8192 if device.type == "cuda" else 1024
    dtype = of_precision(precision)
    a = torch.ones(size, size, dtype=dtype, device=device)
    b = torch.ones(size, size, dtype=dtype, device=device)
    torch.mm(a, b)
    count = 0
    _synchronize(device)
    started = time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        torch.mm(a, b)
        _synchronize(device)
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - started)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
