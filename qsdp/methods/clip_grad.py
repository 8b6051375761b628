"""Clipping gradients by their exact global norm."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from qsdp.common.meshes import groups_of
from qsdp.common.rank_agreement import meet, mistakes_shared
from qsdp.methods.grad_norm import check_loss, global_grad_norm
from qsdp.sparsity.local_shards import local_shard, unique


def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, *, loss: Tensor | float | None = None
) -> float:
    """Scale all gradients in place so that their global norm is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_``, but exact for DTensors of any mesh together with plain
    tensors: the coefficient max_norm / (norm + 1e-6), at most 1, is computed in fp64 and applied in
    the gradients' precision (at least fp32). A norm that is not finite makes every coefficient NaN
    or 0, as in torch: look at the returned norm before stepping. A collective if any parameter is a
    DTensor.

    Args:
        parameters: As for ``global_grad_norm``.
        max_norm: Above 0, the same on every rank.
        loss: As for ``global_grad_norm``: give it to skip a step whose loss is not finite on any
            rank, though all gradients are.

    Returns:
        The norm before clipping.

    Raises:
        ValueError: ``max_norm`` is not above 0, or as ``global_grad_norm``.
        RuntimeError: Ranks give another ``max_norm``, or train another number of parameters.
    """
    parameters = unique(parameters)
    groups, call = groups_of(parameters, with_replicas=True), "qsdp.clip_grad_norm_"
    with mistakes_shared(call, groups):
        check_max_norm(max_norm)
        check_loss(loss)
    num_trained = sum(parameter.requires_grad for parameter in parameters)
    meet(call, {"max_norm": max_norm, "trained parameters": num_trained}, groups)
    norm = global_grad_norm(parameters, loss=loss)
    scale_grads_(parameters, max_norm, norm)
    return norm


def scale_grads_(parameters: Iterable[Tensor], max_norm: float, norm: float) -> None:
    """Clip to ``max_norm`` the gradients whose global norm is known to be ``norm``."""
    coefficient = max_norm / (norm + 1e-6)
    if coefficient >= 1:
        return
    for parameter in unique(parameters):
        if parameter.grad is not None:
            local_shard(parameter.grad).values.mul_(coefficient)


def check_max_norm(max_norm: float) -> None:
    """Raise ValueError unless ``max_norm`` is above 0."""
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}: choose a number above 0.")
