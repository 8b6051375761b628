"""Planning at install, before anything of a sharded model is sent: plans, nodes and stages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from qsdp.comm.group_plan import Parameter, Plan
from qsdp.comm.nodes import Nodes, check_mesh
from qsdp.comm.topology import StageGroup, TopologySplit, open_stages, split
from qsdp.common.dtypes import CODEC_DTYPES
from qsdp.compat.parameter_group import GroupParameter, ParameterGroup
from qsdp.config import QSDPConfig
from qsdp.fsdp.install_arguments import module_name


def plan_nodes(
    plans: list[Plan], launched: Mapping[int, int], config: QSDPConfig, mesh: DeviceMesh | None
) -> Nodes:
    """The planning at install of nodes, of whose ranks launchers say how many they ``launched``."""
    if mesh is not None:
        for group in _shard_groups(plans):
            check_mesh(group, mesh)
    size = config.ranks_per_node
    sizes = launched if size is None else dict.fromkeys(range(dist.get_world_size()), size)
    return Nodes(sizes, mesh)


def plan_splits(
    plans: list[Plan], nodes: Nodes, config: QSDPConfig, mesh: DeviceMesh | None
) -> dict[dist.ProcessGroup, TopologySplit]:
    """The planning at install of how the ranks of process groups are split into stages.

    Raises ValueError where the config asks for stages that cannot be.
    """
    return {group: split(group, nodes, mesh, config) for group in _shard_groups(plans)}


def plan_stages(
    plans: list[Plan], splits: Mapping[dist.ProcessGroup, TopologySplit], mesh: DeviceMesh | None
) -> list[StageGroup]:
    """The planning at install of stages: open all, for the plans. A collective over each group."""
    made = {group: open_stages(group, each.sizes, mesh) for group, each in splits.items()}
    for plan in plans:
        plan.stages = made.get(plan.group, plan.stages)
    return [stage for stages in made.values() for stage in stages]


def _shard_groups(plans: list[Plan]) -> list[dist.ProcessGroup]:
    """The shard groups of several ranks, each once."""
    return [*dict.fromkeys(plan.group for plan in plans if plan.world_size > 1)]


def plan_group(
    group: ParameterGroup,
    index: int,
    names: dict[nn.Parameter, str],
    order: dict[str, int],
    embeddings: set[str],
    config: QSDPConfig,
) -> Plan:
    """The planning at install of how one FSDP2 group travels.

    Raises ValueError for what qsdp does not support, RuntimeError if this torch shards otherwise.
    """
    if group.num_groups > 1:
        raise ValueError(
            f"{module_name(group)} has {group.num_groups} parameter meshes in one fully_shard "
            "call, but qsdp needs one mesh a call: shard such modules apart."
        )
    if group.offloads_to_cpu:
        raise ValueError(
            f"{module_name(group)} uses CPUOffloadPolicy: shard it without offloading."
        )
    if group.shard_group is None:
        raise ValueError(
            f"the mesh of {module_name(group)} has no shard axis: use fully_shard's mesh."
        )
    if group.reduce_dtype is not None and group.reduce_dtype not in CODEC_DTYPES:
        raise ValueError(
            f"{module_name(group)} reduces gradients in {group.reduce_dtype}, which qsdp does "
            "not send: choose float32, bfloat16 or float16."
        )
    parameters = []
    for sharded in group.parameters():
        name = names.get(sharded.parameter)
        if name is None:
            raise ValueError(
                f"{module_name(group)} shards a parameter that model.named_parameters() does not "
                "list: install qsdp on the root of the sharded model, outside a forward or "
                "backward pass."
            )
        if sharded.mesh_ndim > group.mesh_ndim:
            raise ValueError(
                f"{name} is sharded over {sharded.mesh_ndim} mesh dimensions (tensor parallelism "
                f"with FSDP), but qsdp supports the {group.mesh_ndim} of fully_shard's own mesh: "
                "shard it by fully_shard alone."
            )
        if sharded.is_extension:
            raise ValueError(
                f"{name} brings an all-gather of its own (fsdp_pre_all_gather, as float8 does): "
                "use a plain parameter."
            )
        can_train = sharded.dtype.is_floating_point or sharded.dtype.is_complex
        if can_train and sharded.dtype not in CODEC_DTYPES:
            raise ValueError(
                f"{name} is {sharded.dtype}, which qsdp does not send: choose float32, bfloat16 or "
                "float16."
            )
        is_embedding = name in embeddings
        parameters.append(_plan_parameter(name, order[name], sharded, config, is_embedding))
    plan = Plan(parameters, index, group.shard_group, config)
    for parameter, sharded in zip(parameters, group.parameters(), strict=True):
        derived = parameter.padded_numel(plan.world_size)
        if derived != sharded.padded_numel:
            raise RuntimeError(
                f"{parameter.name} takes {sharded.padded_numel} values a rank in FSDP2's tables, "
                f"but {derived} by its shape {tuple(parameter.shape)}, so that this torch "
                f"({torch.__version__}) shards in a way that qsdp does not know: install another "
                "version of torch."
            )
    return plan


def _plan_parameter(
    name: str,
    index: int,
    sharded: GroupParameter,
    config: QSDPConfig,
    is_embedding: bool,
) -> Parameter:
    bits = config.bits_of(name, is_embedding)
    if not sharded.dtype.is_floating_point:
        bits, why = (32, 32), f"{sharded.dtype} cannot be coded"
    elif config.bits_by_policy(name) is not None:
        why = "policy"
    elif sharded.parameter.dim() < 2:
        bits, why = (32, 32), "norm or bias: fewer than two dimensions"
    else:
        why = "embedding or head" if is_embedding else "default"
    return Parameter(
        name=name,
        index=index,
        shape=sharded.parameter.shape,
        dtype=sharded.dtype,
        shard_dim=sharded.shard_dim,
        weight_bits=bits[0],
        grad_bits=bits[1],
        keeps_bits=config.keeps_bits(name, is_embedding),
        why=why,
    )
