"""Tensors in nested containers."""

from __future__ import annotations

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(output: object) -> list[Tensor]:
    """The tensors in a pytree: what a module returned, in whatever containers."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
