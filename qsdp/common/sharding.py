"""How torch cuts tensors among ranks: the arithmetic of shards."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def chunk(length: int, place: int, num: int) -> tuple[int, int]:
    """Start and size of part ``place`` of ``num`` of ``length`` rows.

    As ``torch.chunk``, FSDP2 and DTensor cut: ceil(length / num) rows each, as long as there are
    any.
    """
    size = -(-length // num)
    start = min(place * size, length)
    return start, min(size, length - start)


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
                length = stops[dim] - starts[dim]
                start, size = chunk(length, mesh.get_local_rank(axis), mesh.size(axis))
                starts[dim] += start
                stops[dim] = starts[dim] + size
            elif type(placement) is not Replicate:
                raise ValueError(
                    f"a parameter is placed as {placement}, but only Shard and Replicate are "
                    "known here: shard the model with fully_shard alone."
                )
    return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))
