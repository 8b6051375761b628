"""Losses that were made at other weights: autograd is told that these are no more."""

from __future__ import annotations

from torch import Tensor, nn
from torch.autograd.graph import increment_version

from qsdp.compat.parameter_group import parameter_groups


def invalidate_losses(model: nn.Module) -> None:
    """Make autograd refuse the backward pass of every loss that was made of ``model`` so far.

    Its weights are about to change. It refuses where it has kept a weight for the backward pass,
    which a lone linear layer and layers that are recomputed do not ask for. Edits of a shard do not
    show in the gathered weights that autograd has seen, whose numbers of versions FSDP2 keeps.
    """
    gathered = [p for group in parameter_groups(model) for p in group.unsharded_parameters()]
    seen: list[Tensor] = [p for p in (*gathered, *model.parameters()) if p is not None]
    increment_version(seen)


def is_about_invalid_loss(error: BaseException) -> bool:
    """Whether ``error`` refuses such a backward pass: autograd's words, or those of the wire."""
    words = ("modified by an inplace operation", "was on the other side of handle.aside()")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
