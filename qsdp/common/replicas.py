"""Replicas of sharded models: gradients are averaged over them, and no mesh tells of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from weakref import WeakSet

import torch.distributed as dist
from torch import Tensor


class ReplicatedModel(Protocol):
    """A sharded model with replicas, over which its gradients are averaged, beside its meshes."""

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The group of this rank's place in all replicas, if there are several."""

    def parameters(self) -> Iterable[Tensor]:
        """All parameters of the model."""


replicated: WeakSet[ReplicatedModel] = WeakSet()
"""All there are now: ``qsdp.install`` with replicas adds to it, and parameters know of none."""


def replicas_of(tensors: Iterable[Tensor]) -> list[dist.ProcessGroup]:
    """The groups over which gradients of ``tensors``, of ``replicated`` models, are averaged."""
    if not replicated:
        return []
    owners = {id(p): model.replicas for model in replicated for p in model.parameters()}
    found = dict.fromkeys(owners.get(id(tensor)) for tensor in tensors)
    return [group for group in found if group is not None and group.size() > 1]
