"""How a model's parameters are cut into the shards of the simulated ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qsdp.common.dtypes import CODEC_DTYPES
from qsdp.compat.parameter_names import named_parameters


class SimulatedSharding:
    """How parameters are cut into shards of the simulated ranks: along which dimension.

    Args:
        model: The plain model.
        world_size: Ranks of the shard axis.
        dims: The dimension, by name, of those parameters that are not sharded along the first.

    Raises:
        ValueError: FSDP2 cannot shard the model so, or qsdp not send it.
    """

    def __init__(self, model: nn.Module, world_size: int, dims: Mapping[str, int]) -> None:
        _check_model(model, world_size, dims)
        self._world_size, self._dims = world_size, dims

    def cut(self, name: str, whole: Tensor) -> list[Tensor]:
        """Rows of ceil(n / N), the last ones shorter or empty."""
        dim, size = self._dims.get(name, 0), self._world_size
        parts = list(whole.chunk(size, dim))
        empty = whole.narrow(dim, 0, 0)
        return [part.contiguous() for part in parts] + [empty] * (size - len(parts))

    def join(self, name: str, rows: list[Tensor]) -> Tensor:
        """The inverse of ``cut``."""
        return torch.cat(rows, self._dims.get(name, 0))


def _check_model(model: nn.Module, world_size: int, shard_dims: Mapping[str, int]) -> None:
    named = named_parameters(model)
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameters: give a model to train.")
    for name in shard_dims:
        if name not in named:
            raise ValueError(
                f"shard_dims names {name!r}, which is no parameter of the model: give names of "
                "model.named_parameters()."
            )
    for name, parameter in named.items():
        if isinstance(parameter, DTensor) or parameter.is_meta:
            raise ValueError(
                f"{name} is {'sharded' if isinstance(parameter, DTensor) else 'on meta'}: give the "
                "plain model with its initial weights."
            )
        if parameter.is_floating_point() and parameter.dtype not in CODEC_DTYPES:
            raise ValueError(
                f"{name} is {parameter.dtype}, which qsdp does not send: choose float32, bfloat16 "
                "or float16."
            )
        if not parameter.dim():
            raise ValueError(
                f"{name} is a scalar, which FSDP2 cannot shard: give it one dimension."
            )
        dim = shard_dims.get(name, 0)
        if not 0 <= dim < parameter.dim() or (dim and parameter.shape[dim] % world_size):
            raise ValueError(
                f"shard_dims gives {dim} for {name} of shape {tuple(parameter.shape)}: choose a "
                f"dimension that {world_size} ranks divide."
            )
