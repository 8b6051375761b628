"""Collectives of torch whose names depend on its version, or that gloo cannot do on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from qsdp.compat.process_groups import backend_of


def all_gather_single(
    output: Tensor, input: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> dist.Work | None:
    """Torch's collective all-gather of 1-D ``input`` into ``output`` (renamed in torch 2.13)."""
    single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    work: dist.Work | None = single(output, input, group=group, async_op=async_op)
    return work


def all_gather_over_groups(values_N: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Torch's collective all-gather of 1-D values over one group after the other, by rank."""
    for group in groups:
        everyones_N = values_N.new_empty(group.size() * values_N.numel())
        all_gather_single(everyones_N, values_N, group)
        values_N = everyones_N
    return values_N


def reduce_scatter_single(output: Tensor, input: Tensor, group: dist.ProcessGroup) -> None:
    """Torch's collective sum-reduce-scatter of 1-D ``input``, as FSDP2's (renamed in 2.13)."""
    single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    single(output, input, group=group)


def full_tensor(tensor: DTensor) -> Tensor:
    """Torch's collective for the whole of a DTensor, also where gloo cannot do it on a GPU.

    Over gloo a GPU's parts meet, and the whole is, on the CPU: ``DTensor.full_tensor`` would let
    gloo read the GPU's addresses as the host's.
    """
    mesh = tensor.device_mesh
    groups = mesh.get_all_groups()
    if tensor.device.type == "cpu" or all(backend_of(g, tensor.device) != "gloo" for g in groups):
        return tensor.full_tensor()
    names = mesh.mesh_dim_names or tuple(f"axis {i}" for i in range(mesh.ndim))
    on_cpu = DeviceMesh.from_group(groups, "cpu", mesh.mesh, mesh_dim_names=names)
    local = tensor.to_local().cpu()
    parts = DTensor.from_local(
        local, on_cpu, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )
    return parts.full_tensor()
