"""``simulate(model, config, world_size=N, ...)``: what is simulated, as a user says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsdp.config import QSDPConfig
from qsdp.simulation.numbering import Group, number_model
from qsdp.simulation.ranks import SimulatedRanks
from qsdp.simulation.simulated_shards import SimulatedSharding
from qsdp.simulation.simulated_wire import SimulatedWire
from qsdp.simulation.training import MakeOptimizer, Simulation


def simulate(
    model: nn.Module,
    config: QSDPConfig | None = None,
    *,
    world_size: int,
    optimizer: MakeOptimizer,
    groups: Sequence[Group] = (),
    ranks_per_node: int | None = None,
    replicas: int = 1,
    quantized_replicas: bool = False,
    param_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
    shard_dims: Mapping[str, int] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> Simulation:
    """Make a simulation: train as ``world_size`` ranks of FSDP2 with qsdp would, bit for bit.

    It runs in one process.

    To choose bits before renting a cluster (QSDP, arXiv 2302.02390). A step costs the computation
    of all ranks one after the other; memory holds one set of shards and optimizer states, the
    weights of a step, and the gradients of one rank beside the sums so far.

    The same bits come out under the same conditions as anywhere: the same kernels of torch (device,
    thread count), deterministic operations, no dropout (ranks have generators of their own), and
    with ``replicas`` above 2 and FSDP2's own all-reduce only up to the order of its sum. All ranks
    share one set of buffers. Optimizers see the shards of one rank: CrAM and whatever else needs
    the whole model is not simulated.

    Args:
        model: The plain model, before ``fully_shard``; its weights are where training starts. It is
            not changed.
        config: What ``qsdp.install`` is given; None takes the defaults.
        world_size: Ranks of the shard axis.
        optimizer: Called once a rank of the shard axis with its shards, in the order of
            ``model.parameters()``; returns an optimizer.
        groups: What ``fully_shard`` is called on, except the root, which always is: modules, their
            names, or lists of these for one call on several modules. Groups number random keys.
        ranks_per_node: Consecutive ranks on one node, where ``config.ranks_per_node`` does not say
            it; None is 1.
        replicas: Ranks of the replicate axis (HSDP), of which each has a shard group.
        quantized_replicas: Average over replicas as ``install`` does with a ``replicate_mesh``.
        param_dtype: What gathered parameters are cast to, as in ``MixedPrecisionPolicy``.
        reduce_dtype: The dtype of gradients in the reduce.
        shard_dims: The dimension, by name, of those parameters that ``shard_placement_fn`` does not
            shard along the first.
        loss: Makes a scalar of what the model returns; None if it returns a scalar.

    Returns:
        A ``Simulation`` before its first step.

    Raises:
        ValueError: An argument is not as above.
    """
    config = QSDPConfig() if config is None else config
    if not isinstance(config, QSDPConfig):
        raise ValueError(f"config is a {type(config).__name__}: give a qsdp.QSDPConfig.")
    if ranks_per_node is None:
        ranks_per_node = config.ranks_per_node or 1
    elif config.ranks_per_node not in (None, ranks_per_node):
        raise ValueError(
            f"ranks_per_node is {ranks_per_node}, and that of the config is "
            f"{config.ranks_per_node}: leave one of the two out."
        )
    world = SimulatedRanks(
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        replicas=replicas,
        quantized_replicas=quantized_replicas,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
    )
    sharding = SimulatedSharding(model, world_size, dict(shard_dims or {}))
    numbers = number_model(model, groups)
    wire = SimulatedWire(model, config, world, numbers, sharding)
    return Simulation(model, wire, optimizer, loss)
