"""Which ranks the meshes of a model's tensors hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from qsdp.common.replicas import replicas_of

Groups = tuple[dist.ProcessGroup, ...]
"""The process groups over which the parts of a tensor make the whole: one a sharded mesh axis."""


def groups_of(tensors: Iterable[Tensor], *, with_replicas: bool = False) -> list[dist.ProcessGroup]:
    """The process groups of all axes of the meshes of ``tensors``: none where all are plain.

    The last axes, over which HSDP shards and passes meet, come first. ``with_replicas``, those of
    ``replicas_of`` come last: all these ranks take one step.
    """
    tensors = list(tensors)
    meshes = dict.fromkeys(t.device_mesh for t in tensors if isinstance(t, DTensor))
    groups = dict.fromkeys(group for mesh in meshes for group in mesh.get_all_groups()[::-1])
    replicas = replicas_of(tensors) if with_replicas else []
    return [group for group in groups if group.size() > 1] + replicas


def covering(meshes: Iterable[DeviceMesh]) -> DeviceMesh | None:
    """The first of ``meshes`` that holds the ranks of all others, if any does."""
    ranks = {mesh: ranks_of(mesh) for mesh in meshes}
    everyone = frozenset[int]().union(*ranks.values())
    return next((mesh for mesh, own in ranks.items() if own == everyone), None)


def ranks_of(mesh: DeviceMesh) -> frozenset[int]:
    """The global ranks of ``mesh``."""
    return frozenset(mesh.mesh.flatten().tolist())
