"""What a target keeps, written on whole tensors with loops: shares nothing with qsdp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.support.cram_reference import top_k_masks


def kept(
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    *,
    sparsity: float = 0.0,
    layer: bool = False,
    pattern: tuple[int, int] | None = None,
    block: int = 1,
) -> list[Tensor]:
    """Masks of matrices whose input dimensions are ``dims``; no blocks of equal sums."""
    if pattern is not None:
        return [_pattern(tensor, dim, *pattern) for tensor, dim in zip(tensors, dims, strict=True)]
    scores = [_sums(tensor, dim, block) for tensor, dim in zip(tensors, dims, strict=True)]
    masks: list[Tensor] = []
    for competing in [[s] for s in scores] if layer else [scores]:
        total = sum(score.numel() for score in competing)
        masks += top_k_masks(competing, total - round(sparsity * total))
    return [m.repeat_interleave(block, d) for m, d in zip(masks, dims, strict=True)]


def _pattern(tensor: Tensor, dim: int, keep: int, size: int) -> Tensor:
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    lines = zip(tensor.unbind(1 - dim), mask.unbind(1 - dim), strict=True)
    for values, chosen in lines:
        for begin in range(0, len(values), size):
            group = values[begin : begin + size].abs().tolist()
            for place in sorted(range(size), key=lambda i: (-group[i], i))[:keep]:
                chosen[begin + place] = True
    return mask


def _sums(tensor: Tensor, dim: int, block: int) -> Tensor:
    if block == 1:
        return tensor
    parts = [part.abs().double().sum(dim) for part in tensor.split(block, dim)]
    return torch.stack(parts, dim)
