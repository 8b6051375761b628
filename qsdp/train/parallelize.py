"""From a configuration to a model that trains on many ranks: an ordered recipe."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import qsdp
from qsdp.common.user_errors import counted
from qsdp.models.language_model import LanguageModel
from qsdp.models.registry import family_of_size
from qsdp.models.size import ModelSize
from qsdp.train.config import TrainConfig
from qsdp.train.world import World


@dataclass(frozen=True)
class Sharded:
    """A parallelized model and its wire."""

    model: LanguageModel
    handle: qsdp.Handle | None
    """qsdp's handle; None for stock FSDP2."""


def check_replicas(config: TrainConfig, world: World) -> None:
    """Raise ValueError unless the ranks can be dealt out to the replicas evenly.

    Where qsdp averages over these, each must have two or more.
    """
    if world.size % config.run.replicas:
        raise ValueError(
            f"--replicas is {config.run.replicas}, which does not divide the "
            f"{counted(world.size, 'rank')}: choose a divisor, 1 for none."
        )
    if config.qsdp is not None and 1 < config.run.replicas == world.size:
        allowed = [str(n) for n in range(1, world.size) if world.size % n == 0]
        raise ValueError(
            f"--replicas is {config.run.replicas}, which leaves each replica one rank and nothing "
            f"to shard, as qsdp needs it: choose {' or '.join(allowed)}, or leave out --qsdp-bits."
        )


def check_nodes(config: TrainConfig, world: World) -> None:
    """Raise ValueError unless a parallelized model's replicas fill nodes of a given size evenly.

    Only where the reduce needs that, or codes that are kept between the ranks of a node.
    """
    wire = config.qsdp
    if wire is None or wire.ranks_per_node is None:
        return
    size = world.size // config.run.replicas
    ranks = f"{size} ranks {'of a replica ' if config.run.replicas > 1 else ''}"
    for first in range(0, world.size, size):
        found = Counter(rank // wire.ranks_per_node for rank in range(first, first + size))
        nodes = list(found.values())
        if wire.needs_nodes and len(set(nodes)) > 1:
            raise ValueError(
                f"--qsdp-ranks-per-node is {wire.ranks_per_node}, which does not split the {ranks}"
                f"evenly as --qsdp-reduce {wire.reduce} needs it: choose a divisor, or "
                "--qsdp-reduce flat."
            )
        if wire.delta_codes == "node" and (len(set(nodes)) > 1 or nodes[0] in (1, size)):
            allowed = [str(n) for n in range(2, size) if size % n == 0]
            choice = f"choose {' or '.join(allowed)}, or " if allowed else ""
            raise ValueError(
                f"--qsdp-ranks-per-node is {wire.ranks_per_node}, which does not split the {ranks}"
                "into several nodes of several ranks each as --qsdp-delta-codes node needs it: "
                f"{choice}leave out --qsdp-delta-codes."
            )


def parallelize(config: TrainConfig, size: ModelSize, world: World) -> Sharded:
    """Parallelize the model of ``size`` over ``world``: weights initialised, wire installed.

    1. on the meta device: no rank ever holds the whole model;
    2. each block is one FSDP group, the embeddings and the last norm are the root's; a group's
       gather runs beside the group before it;
    3. the shards get memory, then their slice of the initial weights;
    4. qsdp takes over the gathers and reduces, if asked.
    """
    wire = config.qsdp
    shard_mesh, replicate_mesh = _meshes(config, world)
    model = shard_model(config, size, world, shard_mesh)
    family_of_size(size).init_weights(model, config.run.seed)
    if wire is None:
        return Sharded(model, None)
    return Sharded(model, qsdp.install(model, wire, replicate_mesh=replicate_mesh))


def shard_model(
    config: TrainConfig, size: ModelSize, world: World, mesh: DeviceMesh
) -> LanguageModel:
    """A model sharded over ``mesh`` whose weights are still to be filled."""
    with torch.device("meta"):
        model = family_of_size(size).build(size)
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if config.run.precision == "bf16"
        else MixedPrecisionPolicy()
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module, following in pairwise(cast(list[FSDPModule], [model, *model.blocks])):
        module.set_modules_to_forward_prefetch([following])
    model.to_empty(device=world.device)
    return model


def _meshes(config: TrainConfig, world: World) -> tuple[DeviceMesh, DeviceMesh | None]:
    """The mesh for ``fully_shard``, and the one over which qsdp averages gradients of replicas.

    Consecutive ranks share a replica: the all-reduce between replicas is what crosses nodes, and it
    carries a shard where a gather carries all. Stock FSDP2 takes both axes and does it itself.
    """
    if config.run.replicas == 1:
        return world.mesh, None
    shape = (config.run.replicas, world.size // config.run.replicas)
    mesh = init_device_mesh(world.mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))
    return (mesh, None) if config.qsdp is None else (mesh["shard"], mesh["replicate"])
