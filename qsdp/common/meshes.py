"""Which ranks hold the tensors of a model.

These are its meshes, what lies on some of the ranks alone, and replicas that no mesh tells of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol
from weakref import WeakSet

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Groups = tuple[dist.ProcessGroup, ...]
"""The process groups over which the parts of a tensor make the whole: one a sharded mesh axis."""


class Reach(NamedTuple):
    """Over which ranks what is counted of a tensor adds up to the whole job's."""

    groups: Groups
    """The process groups, to be gone through one after the other."""
    is_counted: bool = True
    """Whether this rank's part adds to that: of equal parts one does."""
    first_rank: int = 0
    """The first of the ranks that share the tensor: tensors of the same name are in this order."""


Spread = Mapping[DeviceMesh, Reach]
"""What the tensors of a mesh are counted over, where that is not their own ranks alone."""


class Averaged(Protocol):
    """A sharded model whose gradients are averaged over replicas that its meshes do not hold."""

    @property
    def replicas(self) -> dist.ProcessGroup | None: ...

    def parameters(self) -> Iterable[Tensor]: ...


averaged: WeakSet[Averaged] = WeakSet()
"""All there are now: ``qsdp.install`` with replicas adds to it, and parameters know of none."""


def replicas_of(tensors: Iterable[Tensor]) -> list[dist.ProcessGroup]:
    """The groups over which gradients of ``tensors``, of ``averaged`` models, are averaged."""
    if not averaged:
        return []
    owners = {id(p): model.replicas for model in averaged for p in model.parameters()}
    found = dict.fromkeys(owners.get(id(tensor)) for tensor in tensors)
    return [group for group in found if group is not None and group.size() > 1]


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


def spread_of(tensors: Iterable[Tensor], *, with_replicas: bool = False) -> Spread:
    """What must be counted over more ranks than share a tensor, so that all get one number.

    These are the meshes of some of the ranks over which others of ``tensors`` are sharded. Each
    part of the ranks has tensors of its own there under the same names: experts, all of which
    count. But a mesh may lack a named axis of another, along which that one's tensors are cut: then
    it has the same tensors on all ranks of the axis, as tensor parallelism leaves what it does not
    cut, and the first ranks' count.

    Args:
        tensors: All that are counted together.
        with_replicas: Also count so where meshes repeat tensors (HSDP), or ``replicas_of`` does:
            then the first replica's count.

    Raises:
        ValueError: No mesh holds the ranks of all others.
    """
    tensors = list(tensors)
    cut: dict[DeviceMesh, set[int]] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            axes = cut.setdefault(tensor.device_mesh, set())
            axes.update(i for i, placed in enumerate(tensor.placements) if placed.is_shard())
    if not cut or (len(cut) == 1 and not with_replicas):
        return {}
    whole = covering(cut)
    if whole is None:
        largest, *others = sorted(cut, key=lambda mesh: -mesh.size())
        other = next(mesh for mesh in others if not ranks_of(mesh) <= ranks_of(largest))
        raise ValueError(
            f"some parameters are sharded over ranks {_listed(largest)}, others over ranks "
            f"{_listed(other)}, and none over all of these: shard some over all ranks that train "
            "together."
        )

    replicas = replicas_of(tensors) if with_replicas else []
    is_first = all(group.rank() == 0 for group in replicas)
    groups = tuple(group for group in [*whole.get_all_groups(), *replicas] if group.size() > 1)
    spread = {}
    for mesh in cut:
        own = ranks_of(mesh)
        if own < ranks_of(whole):
            firsts = (_first_repeated(mesh, other, axes) for other, axes in cut.items())
            first = next((ranks for ranks in firsts if ranks), own)
            spread[mesh] = Reach(groups, own == first and is_first, min(first))
        elif replicas or (with_replicas and len(cut[mesh]) < mesh.ndim):
            spread[mesh] = Reach(groups, is_first)
    return spread


def _first_repeated(mesh: DeviceMesh, other: DeviceMesh, cut: set[int]) -> frozenset[int]:
    """The ranks that come first, if ``mesh`` is ``other`` without axes of which some are ``cut``.

    First is along these axes. Else there are none.
    """
    names, own = other.mesh_dim_names or (), mesh.mesh_dim_names or ()
    if not own or not set(own) < set(names) or all(names[axis] in own for axis in cut):
        return frozenset()
    place = other.get_coordinate()
    assert place is not None
    slices, firsts = (
        tuple(slice(None) if n in own else at for n, at in zip(names, places, strict=True))
        for places in (place, [0] * len(names))
    )
    is_slice = ranks_of(mesh) == frozenset(other.mesh[slices].flatten().tolist())
    return frozenset(other.mesh[firsts].flatten().tolist()) if is_slice else frozenset()


def _listed(mesh: DeviceMesh) -> str:
    return ", ".join(map(str, sorted(ranks_of(mesh))))
