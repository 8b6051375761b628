"""Bool masks at one bit a value: bit i of byte j is value 8 j + i."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)] of a bool mask of n values in any shape; the last bits are 0."""
    flat = mask.reshape(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (flat.to(torch.uint8) << shifts).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, num: int) -> Tensor:
    """The first ``num`` values of a mask that ``pack`` made: bool [num]."""
    if bits.device.type == "cpu":
        values = np.unpackbits(bits.numpy(), count=num, bitorder="little")
        return torch.from_numpy(values).view(torch.bool)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).view(-1)[:num].bool()


def count(bits_RB: Tensor) -> Tensor:
    """How many bits are set in each row, int64 [rows]."""
    bytes_N = torch.arange(256, device=bits_RB.device)
    of_byte_N = torch.stack([bytes_N >> i & 1 for i in range(8)]).sum(0)
    return of_byte_N[bits_RB.long()].sum(1)


@dataclass(frozen=True)
class PackedMask:
    """A bool mask at one bit a value."""

    bits: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, mask: Tensor) -> PackedMask:
        """The mask, packed."""
        return cls(pack(mask), tuple(mask.shape))

    def unpack(self) -> Tensor:
        """The mask again."""
        return unpack(self.bits, math.prod(self.shape)).view(self.shape)
