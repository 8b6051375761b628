"""What ``install`` makes of a sharded model, once all ranks have agreed: the parts of a handle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from qsdp.comm.bit_budget import check_budget
from qsdp.comm.group_plan import Plan
from qsdp.comm.learned_levels import LearnedLevels
from qsdp.comm.nodes import launched_ranks
from qsdp.comm.policy_checks import check_embeddings, check_policy
from qsdp.comm.topology import StageGroup, TopologySplit
from qsdp.comm.traffic import Traffic
from qsdp.comm.wire_state import Wire
from qsdp.common.model_structure import embedding_names, tied_names
from qsdp.common.rank_agreement import mistakes_shared
from qsdp.compat.parameter_group import ParameterGroup, modules_without_group
from qsdp.compat.parameter_names import clean_names, named_parameters
from qsdp.compat.resharding import reshard_module
from qsdp.config import QSDPConfig
from qsdp.fsdp import install_agreement
from qsdp.fsdp.bits_and_levels import Adaptation
from qsdp.fsdp.gather_hook import AllGatherHook
from qsdp.fsdp.install_arguments import (
    check_argument_type,
    refuse_own_comms,
    replica_group,
)
from qsdp.fsdp.install_planning import plan_group, plan_nodes, plan_splits, plan_stages
from qsdp.fsdp.pass_agreement import PassMembers
from qsdp.fsdp.passes import Passes
from qsdp.fsdp.quantized_collectives import InstalledComms
from qsdp.fsdp.report import Row, unsharded_rows
from qsdp.ops import native


@dataclass(frozen=True, kw_only=True)
class BuiltParts:
    """What ``build_parts`` puts on a model: the parts that a handle is made of."""

    plans: Sequence[Plan]
    unsharded: Mapping[int, Row]
    """What the report says of parameters without a plan, by their places in the model."""
    everyone: Sequence[dist.ProcessGroup]
    """Process groups that together reach all ranks, one after the other."""
    splits: Sequence[TopologySplit]
    """Those of all process groups of several ranks."""
    stages: Sequence[StageGroup]
    """The groups of all splits."""
    wire: Wire
    adaptation: Adaptation
    passes: Passes
    comms: InstalledComms


def build_parts(
    model: nn.Module,
    config: QSDPConfig,
    groups: list[ParameterGroup],
    replicate_mesh: DeviceMesh | None,
    node_mesh: DeviceMesh | None,
) -> BuiltParts:
    """Build the parts of the wire on ``model``, whose ``groups`` these are. A collective."""
    for group in groups:
        reshard_module(group.module)
    names = {p: name for name, p in named_parameters(model).items()}
    order = {name: i for i, name in enumerate(names.values())}
    everyone, replicas = _agree_on_meshes(groups, replicate_mesh, node_mesh)
    with mistakes_shared(install_agreement.CALL, everyone):
        here = launched_ranks()
    launched = install_agreement.install_facts_by_rank(everyone, here)
    with mistakes_shared(install_agreement.CALL, everyone):
        check_argument_type("config", config, QSDPConfig)
        native.serving(torch.device(groups[0].mesh.device_type))  # raises if not as required
        if any(isinstance(group.comms()[0], AllGatherHook) for group in groups):
            raise ValueError(
                f"qsdp is installed on this {type(model).__name__} already: call "
                "handle.remove() first."
            )
        refuse_own_comms(groups, replicas)
        plans = _make_plans(model, config, groups, names, order)
        if (
            node_mesh is not None
            and config.ranks_per_node is not None
            and node_mesh.size() == dist.get_world_size()
        ):
            raise ValueError(
                f"ranks_per_node is {config.ranks_per_node} and a node_mesh is given, which "
                "holds all ranks and says how they split: leave one of the two out."
            )
        nodes = plan_nodes(plans, launched, config, node_mesh)
        splits = plan_splits(plans, nodes, config, node_mesh)
    unsharded = unsharded_rows(names, plans)
    install_agreement.check_install_agreement(
        everyone, install_agreement.describe_install(config, groups, plans)
    )
    wire = Wire(config, Traffic(nodes))
    stages = plan_stages(plans, splits, node_mesh)
    if config.levels == "learned":
        wire.levels = LearnedLevels(order)
    adaptation = Adaptation(plans, groups, wire, everyone)
    passes = Passes(plans, groups, modules_without_group(model), wire, adaptation, replicas)
    comms = InstalledComms(plans, groups, wire, passes, replicas)
    passes.caches, passes.meetings.comms = PassMembers(comms.gathers), comms.given
    return BuiltParts(
        plans=plans,
        unsharded=unsharded,
        everyone=everyone,
        splits=[*splits.values()],
        stages=stages,
        wire=wire,
        adaptation=adaptation,
        passes=passes,
        comms=comms,
    )


def _agree_on_meshes(
    groups: list[ParameterGroup],
    replicate_mesh: DeviceMesh | None,
    node_mesh: DeviceMesh | None,
) -> tuple[list[dist.ProcessGroup], dist.ProcessGroup | None]:
    """Process groups that together reach all ranks, and the one of the replicas."""
    meshes = dict.fromkeys(group.mesh for group in groups)
    everyone = [axis for mesh in meshes for axis in mesh.get_all_groups()]
    # Before anything of replicate_mesh is used, which another rank may lack.
    with mistakes_shared(install_agreement.CALL, everyone):
        replicas = replica_group(groups, replicate_mesh)
        check_argument_type("node_mesh", node_mesh, DeviceMesh | None)
        given = install_agreement.describe_meshes(
            replicate_mesh=replicate_mesh, node_mesh=node_mesh
        )
    install_agreement.check_install_agreement(everyone, given)
    return everyone + ([] if replicas is None else [replicas]), replicas


def _make_plans(
    model: nn.Module,
    config: QSDPConfig,
    groups: list[ParameterGroup],
    names: dict[nn.Parameter, str],
    order: dict[str, int],
) -> list[Plan]:
    """One plan a group. Raises ValueError where the config does not go with the model."""
    tied, tables = tied_names(model), embedding_names(model)
    clean = clean_names(model, {*tied, *tied.values(), *tables})
    aliases = {clean[alias]: clean[name] for alias, name in tied.items()}
    check_policy(config, list(order), aliases)
    embeddings = {clean[name] for name in tables}
    check_embeddings(config, embeddings)
    plans = [
        plan_group(group, index, names, order, embeddings, config)
        for index, group in enumerate(groups)
    ]
    weights, grads = (
        [claim for plan in plans for _, claim in plan.claims(is_grad=is_grad)]
        for is_grad in (False, True)
    )
    check_budget(weights, grads, config)
    return plans
