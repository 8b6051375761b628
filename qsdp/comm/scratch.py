"""Buffers that outlive a call, so that the hot path neither allocates nor faults pages in."""

import torch
from torch import Tensor


class Scratch:
    """Byte buffers by purpose, grown to the largest size asked for.

    On a GPU the caching allocator is that pool already, and knows which stream still reads what.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, purpose: str, num_bytes: int, device: torch.device) -> Tensor:
        """uint8 [num_bytes], uninitialised, valid until the next call with this purpose."""
        if device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._buffers[purpose] = torch.empty(num_bytes, dtype=torch.uint8)
        return buffer[:num_bytes]
