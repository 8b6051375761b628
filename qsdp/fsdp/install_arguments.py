"""What the arguments of ``install`` may be: a mesh of replicas, a model without own collectives."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qsdp.compat.parameter_group import ParameterGroup
from qsdp.config import QSDPConfig


def replica_group(
    groups: list[ParameterGroup], mesh: DeviceMesh | None
) -> dist.ProcessGroup | None:
    """The process group of the argument ``replicate_mesh``, checked against the model's mesh."""
    check_argument_type("replicate_mesh", mesh, DeviceMesh | None)
    if mesh is None:
        return None
    if mesh.ndim != 1:
        raise ValueError(f"replicate_mesh has {mesh.ndim} dimensions: give a 1-D mesh.")
    for group in groups:
        if group.mesh_ndim != 1 or group.mesh.size() < 2:
            raise ValueError(
                f"{module_name(group)} is sharded over a mesh of shape {tuple(group.mesh.shape)}, "
                "where replicate_mesh has no place: shard over a 1-D mesh of 2 or more ranks, or "
                "leave replicate_mesh out."
            )
    shared = set(mesh.mesh.tolist()) & set(groups[0].mesh.mesh.tolist())
    if shared != {dist.get_rank()}:
        raise ValueError(
            f"replicate_mesh holds the ranks {mesh.mesh.tolist()}, of which the shard mesh has "
            f"{sorted(shared)} too: give a mesh that shares this rank alone with it."
        )
    return mesh.get_group()


def refuse_own_comms(groups: list[ParameterGroup], replicas: dist.ProcessGroup | None) -> None:
    """Raise ValueError if the model that is an argument of ``install`` has own collectives.

    The wire would take the place of what the user gave FSDP2.
    """
    for group in groups:
        if own := group.custom_comms():
            raise ValueError(
                f"{module_name(group)} has a collective of its own, {type(own[0]).__name__}, whose "
                "place qsdp would take: leave out set_custom_all_gather, "
                "set_custom_reduce_scatter, set_allocate_memory_from_process_group_for_comm and "
                "set_symm_mem_for_comm."
            )
        if replicas is not None and group.comms()[3] is not None:
            raise ValueError(
                f"{module_name(group)} has a hook of set_all_reduce_hook, whose place the average "
                "over replicate_mesh would take: leave out one of the two."
            )


def check_argument_type(name: str, given: object, wanted: Any) -> None:
    """Raise ValueError unless an argument of ``install`` is a ``wanted``, or None if it may be."""
    if not isinstance(given, wanted):
        allowed = "qsdp.QSDPConfig" if wanted is QSDPConfig else "DeviceMesh"
        raise ValueError(f"{name} is a {type(given).__name__}: give a {allowed}.")


def module_name(group: ParameterGroup) -> str:
    """What messages on the arguments of ``install`` call a group: the type of its first module."""
    return type(group.module).__name__
