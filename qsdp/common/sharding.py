"""How torch cuts tensors among ranks: the arithmetic of shards."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Where a parameter's local part lies in the full tensor: one slice a dim, maybe empty.

    Raises ValueError for a placement other than Replicate and Shard.
    """
    starts, stops = [0] * parameter.ndim, list(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis, placement in enumerate(parameter.placements):
            if type(placement) is Shard:
                dim = placement.dim
                size = -(-(stops[dim] - starts[dim]) // mesh.size(axis))
                start = starts[dim] + mesh.get_local_rank(axis) * size
                starts[dim] = min(start, stops[dim])
                stops[dim] = min(start + size, stops[dim])
            elif type(placement) is not Replicate:
                raise ValueError(
                    f"A parameter is placed as {placement}, but only Shard and Replicate are "
                    "known here: shard the model with fully_shard alone."
                )
    return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))
