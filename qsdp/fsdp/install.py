"""``install(model, config) -> handle``: the quantized wire on a model that the user sharded."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from qsdp.compat.parameter_group import parameter_groups
from qsdp.config import QSDPConfig
from qsdp.fsdp.build_parts import build_parts
from qsdp.fsdp.handle import Handle


def install(
    model: nn.Module,
    config: QSDPConfig | None = None,
    *,
    replicate_mesh: DeviceMesh | None = None,
    node_mesh: DeviceMesh | None = None,
) -> Handle:
    """Install the wire: send the weights and gradients of ``model`` as ``config`` says.

    A collective: all ranks of the model's mesh call it, and make sure that they agree.

    Args:
        model: A module on which ``fully_shard`` was called, itself or on submodules. Its parameters
            stay plain DTensors; optimizers, checkpoints and clipping work as before.
        config: Bits, buckets, rounding; None takes the defaults (8 bits both ways).
        replicate_mesh: HSDP with a quantized all-reduce: a 1-D mesh over the ranks that hold the
            same shards, of a model that was sharded over a 1-D mesh of its own.
        node_mesh: A 2-D mesh [nodes, ranks of a node] over the shard group's ranks, in place of
            ``ranks_per_node``, also for the counters of bytes; where it holds all ranks, not beside
            it.

    Returns:
        A ``Handle``: report, traffic counters, state for checkpoints, removal.

    Raises:
        ValueError: The model is not sharded by FSDP2, has the wire already, or uses what qsdp does
            not support: CPUOffloadPolicy, per-parameter meshes, tensor parallelism, a mesh without
            a shard axis, float64 in parameters or reduces, parameters with an all-gather of their
            own; a policy pattern, or ``embedding_bits``, sets the bits of no parameter; the budget
            is less than 2 bits and their metadata take, or has nothing to allot; the shard group
            does not split into nodes as the config's reduce needs; or replicate_mesh is not such a
            mesh.
        RuntimeError: The ranks do not have the same model, config and meshes.
    """
    groups = parameter_groups(model)
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no FSDP2 parameters: call fully_shard before qsdp.install."
        )
    config = QSDPConfig() if config is None else config
    parts = build_parts(model, config, groups, replicate_mesh, node_mesh)
    return Handle(config, groups, parts)
