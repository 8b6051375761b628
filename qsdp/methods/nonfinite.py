"""What of a step was not finite, looked for only where a norm has said that something was not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from qsdp.common.rank_agreement import compare
from qsdp.sparsity.local_shards import local_shard


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first of ``tensors`` whose part on this rank is not finite: holds a NaN or an Inf."""
    for name, tensor in tensors.items():
        values = local_shard(tensor).values
        if values.is_floating_point() and values.numel():
            ends = torch.stack(values.aminmax()).tolist()  # ``isfinite`` would make copies
            if not all(map(math.isfinite, ends)):
                return name
    return None


def scalar_loss(value: Any) -> Tensor | float | None:
    """``value``, if it is a loss, finite or not: a float, or a tensor of one float; None else."""
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, Tensor):
        return value.detach() if value.numel() == 1 and value.is_floating_point() else None
    return value if isinstance(value, float) else None


def check_scalar_loss(loss: object) -> None:
    """Raise ValueError unless ``loss`` is None or one floating-point number, finite or not."""
    if loss is not None and scalar_loss(loss) is None:
        what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss is {what}: give a float, or a floating-point tensor of one value.")


def name_not_finite(
    parameters: Mapping[str, Tensor], loss: Any, groups: Sequence[dist.ProcessGroup]
) -> str:
    """Say what is not finite: the first of all ranks' gradients, and the first of their losses.

    A collective. The sentence is the same on all ranks of ``groups``.

    Args:
        parameters: By name, in the model's order.
        loss: That of this rank; what is no number is taken for a finite one.
        groups: Their ranks take the step together; none where each has all gradients.
    """
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    name, value = first_not_finite(grads), scalar_loss(loss)
    rank = dist.get_rank() if groups else 0
    mine: dict[str, Any] = {
        "rank": rank,  # facts that differ are exchanged
        "grad": None if name is None else ([*parameters].index(name), name),
        "loss": value is not None and not math.isfinite(float(value)),
    }
    found = compare("the search for what is not finite", mine, groups) or {rank: mine}

    def on(rank: int) -> str:
        return f" on rank {rank}" if groups else ""

    grad = min(((*each["grad"], r) for r, each in found.items() if each["grad"]), default=None)
    losses = [r for r, each in found.items() if each["loss"]]
    told = [] if grad is None else [f"the gradient of {grad[1]}{on(grad[2])}"]
    told += [f"the loss{on(losses[0])}"] if losses else []
    return " and ".join(told) or "the norm of all gradients together"
