"""Buffers that outlive a call, so that the hot path neither allocates nor faults pages in."""

from __future__ import annotations

import torch
from torch import Tensor


class BufferPool:
    """A pool of byte buffers, grown to the largest size asked for.

    They go by purpose, or, where several are in use at once, to whoever acquires and releases them.
    On a GPU the caching allocator is that pool already, and knows which stream still reads what.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._free: list[Tensor] = []

    def take(self, purpose: str, num_bytes: int, device: torch.device) -> Tensor:
        """uint8 [num_bytes], uninitialised, valid until the next call with this purpose."""
        if device.type != "cpu":
            return allocate_buffer(num_bytes, device)
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._buffers[purpose] = allocate_buffer(num_bytes, device)
        return buffer[:num_bytes]

    def acquire(self, num_bytes: int, device: torch.device) -> Tensor:
        """uint8 [num_bytes], uninitialised, the caller's own until ``release``d."""
        if device.type != "cpu":
            return allocate_buffer(num_bytes, device)
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.numel() < num_bytes:
            buffer = allocate_buffer(num_bytes, device)
        return buffer[:num_bytes]

    def release(self, acquired: Tensor) -> None:
        """Let others acquire what ``acquire`` returned."""
        if acquired.device.type == "cpu":
            self._free.append(allocate_buffer(0, acquired.device).set_(acquired.untyped_storage()))
            self._free.sort(key=Tensor.numel)  # the largest is taken first


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous 1-D buffer as its bytes, uint8."""
    return tensor.view(torch.uint8)


def allocate_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """A new buffer that a training step may write, uint8 [num_bytes], uninitialised.

    It may also when a validation in inference mode has made it.
    """
    with torch.inference_mode(False):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
