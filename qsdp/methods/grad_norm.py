"""The exact norm of all gradients, over shards of any mesh."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.common.meshes import Groups
from qsdp.common.model_structure import unique_tensors
from qsdp.common.spread import Spread, spread_of
from qsdp.compat.torch_collectives import all_gather_over_groups
from qsdp.methods.nonfinite import check_scalar_loss, scalar_loss
from qsdp.sparsity.local_shards import local_shard

# A chunk in double precision stays in a CPU's cache; a GPU wants few launches instead.
_CHUNK_CPU = 1 << 16
_CHUNK_GPU = 1 << 24


def global_grad_norm(parameters: Iterable[Tensor], *, loss: Tensor | float | None = None) -> float:
    """The norm of all gradients together: 2-norm, fp64, the same on every rank.

    Every rank adds the squares of its shards in fp64; the ranks' sums are gathered and added in
    rank order, so the result does not depend on the order of arrival. A plain or replicated
    parameter (also an HSDP replica's) counts once; its gradient is taken to be the same on every
    rank, and the first rank's is the one counted. Of parameters that are sharded over some ranks
    alone, beside others over all (experts), those of all ranks count; see ``spread_of``. A
    collective if any parameter is a DTensor, whatever the gradients: a rank may have none.

    Args:
        parameters: Plain tensors or DTensors, the same on every rank; those without a gradient
            add nothing, a tied one counts once.
        loss: This rank's loss, or None: one value, which adds nothing but makes the norm NaN on
            all ranks if it is not finite. It rides along with the sums. Where there is nothing to
            ride on it decides alone in a job of one process, and in larger ones (DDP) nothing: a
            rank that skips its step alone would have other weights than the rest, and gradients
            that are averaged over all ranks tell all of them.

    Returns:
        The norm: not finite on all ranks if a gradient is not finite on any; 0.0 without gradients.

    Raises:
        ValueError: Parameters are sharded over different ranks, and none over all of these, or
            ``loss`` is no float and no floating-point tensor of one value.
    """
    parameters = unique_tensors(parameters)
    check_scalar_loss(loss)
    return norm_among(parameters, spread_of(parameters, with_replicas=True), loss)


def norm_among(
    parameters: Sequence[Tensor], spread: Spread, loss: Tensor | float | None = None
) -> float:
    """The ``global_grad_norm`` of ``parameters``, each once, among those that ``spread`` is of."""
    grads: dict[Groups, list[Tensor]] = {}
    repeated: dict[Groups, list[Tensor]] = {}
    devices: dict[Groups, torch.device] = {}
    for parameter in parameters:
        if parameter.grad is None and not parameter.requires_grad:
            continue
        shard = local_shard(parameter if parameter.grad is None else parameter.grad, spread)
        groups = shard.reach.groups
        devices.setdefault(groups, shard.device)
        if parameter.grad is not None:
            parts = grads if shard.reach.is_counted else repeated
            parts.setdefault(groups, []).append(shard.values)
    sums = {
        groups: _sum_of_squares(grads.get(groups, ()), device)
        # What is equal adds nothing, unless it is equal no more: NaN then.
        + _sum_of_squares(repeated.get(groups, ()), device) * 0.0
        for groups, device in devices.items()
    }
    if loss is not None and _is_heard_by_all(devices):
        sums = {groups: part + _nothing(loss, part.device) for groups, part in sums.items()}
    whole = float(sums.pop((), 0.0))
    total, wholes = 0.0, [whole]
    # The most ranks last: they hear of all.
    for groups in sorted(sums, key=lambda groups: math.prod(group.size() for group in groups)):
        # The wholes ride along: a rank that has seen what is not finite must tell the others.
        part, known = sums[groups], whole if math.isfinite(total) else math.nan
        values = all_gather_over_groups(
            torch.stack([part, torch.full_like(part, known)]), groups
        ).tolist()
        wholes = values[1::2]
        for value in values[::2]:
            total += value
    counted = wholes[0] if all(map(math.isfinite, wholes)) else math.nan
    return math.sqrt(total + counted)


def _is_heard_by_all(reaches: Collection[Groups]) -> bool:
    """Whether the sums over ``reaches`` come to all ranks that take the same step.

    Plain parameters (DDP) are shared with ranks that no group may know of.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    most = max((math.prod(group.size() for group in groups) for groups in reaches), default=1)
    return () not in reaches or most >= size


def _nothing(loss: Tensor | float, device: torch.device) -> Tensor | float:
    """0, or NaN if ``loss`` is not finite. A device that has what is needed is not waited for."""
    value = scalar_loss(loss)
    if not isinstance(value, Tensor):
        return 0.0 if value is None else 0.0 * value
    nothing = value.reshape(()).double() * 0.0
    return nothing if nothing.is_cpu else nothing.to(device)


def _sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of squares in fp64, a scalar tensor on ``device``, without a full fp64 copy."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    size = _CHUNK_CPU if total.device.type == "cpu" else _CHUNK_GPU
    for values in tensors:
        for chunk in values.reshape(-1).split(size):
            wide = chunk.double()
            total += wide.dot(wide).to(total.device)
    return total
