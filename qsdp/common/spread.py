"""Over which ranks a count of a model's tensors is spread, so that all get one number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from qsdp.common.meshes import Groups, covering, ranks_of
from qsdp.common.replicas import replicas_of


class Reach(NamedTuple):
    """Of a spread: over which ranks what is counted of a tensor adds up to the whole job's."""

    groups: Groups
    """The process groups, to be gone through one after the other."""
    is_counted: bool = True
    """Whether this rank's part adds to that: of equal parts one does."""
    first_rank: int = 0
    """The first of the ranks that share the tensor: tensors of the same name are in this order."""


Spread = Mapping[DeviceMesh, Reach]
"""What the tensors of a mesh are counted over, where that is not their own ranks alone."""


def spread_of(tensors: Iterable[Tensor], *, with_replicas: bool = False) -> Spread:
    """The spread of ``tensors``: what is counted over more ranks than share a tensor.

    So all ranks get one number. These are the meshes of some of the ranks over which others of
    ``tensors`` are sharded. Each part of the ranks has tensors of its own there under the same
    names: experts, all of which count. But a mesh may lack a named axis of another, along which
    that one's tensors are cut: then it has the same tensors on all ranks of the axis, as tensor
    parallelism leaves what it does not cut, and the first ranks' count.

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
            f"some parameters are sharded over ranks {_ranks_in_words(largest)}, others over ranks "
            f"{_ranks_in_words(other)}, and none over all of these: shard some over all ranks that "
            "train together."
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
    """The first ranks along the axes of ``other`` that ``mesh`` lacks, if any of these is ``cut``.

    Empty where ``mesh`` is not ``other`` without some of its axes.
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


def _ranks_in_words(mesh: DeviceMesh) -> str:
    return ", ".join(map(str, sorted(ranks_of(mesh))))
