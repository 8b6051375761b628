"""Initial weights that are a pure function of the seed and of a parameter's name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qsdp.common.sharding import local_slices
from qsdp.compat.parameter_names import named_parameters

# Values drawn from one generator key: bounds what a rank draws in vain.
_INIT_BLOCK_VALUES = 1 << 18


@torch.no_grad()
def fill_parameters(model: nn.Module, seed: int, std_of: Callable[[str], float]) -> None:
    """Fill the parameters of a model in place, each as a pure function of (seed, its name).

    Matrices are normal with standard deviation ``std_of(name)``; of vectors those whose name ends
    in bias are 0, and the others, the scales of norms, 1. A parameter may be plain or an FSDP2
    DTensor, whose local shard gets its slice of the full tensor: the model is the same for every
    world size. No communication. Values are drawn on the CPU.

    Raises ValueError for a negative seed, for a parameter still on the meta device, and for a
    sharding that FSDP2 does not make.
    """
    if seed < 0:
        raise ValueError(f"the seed is {seed}: choose 0 or more.")
    for name, parameter in named_parameters(model).items():
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name} is on the meta device: call model.to_empty(device=...) "
                "before init_weights."
            )
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim == 1:
            local.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = std_of(name)
        rows, *others = local_slices(parameter)
        for first, values in _normal_rows(parameter.shape, f"{seed}/{name}", rows):
            target = local[first - rows.start : first - rows.start + len(values)]
            target.copy_(torch.from_numpy(values)[(slice(None), *others)] * std)


def _normal_rows(
    shape: torch.Size, key: str, rows: slice
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Standard normal ``rows`` of a tensor of ``shape``, as (first row, values) pieces.

    The tensor is made of blocks of whole rows, each from a generator of its own: a shard draws
    the blocks it touches and no others.
    """
    if rows.start == rows.stop:
        return
    row_shape = tuple(shape[1:])
    block_rows = max(1, _INIT_BLOCK_VALUES // max(1, math.prod(row_shape)))
    for block_start in range(rows.start - rows.start % block_rows, rows.stop, block_rows):
        num_rows = min(block_rows, shape[0] - block_start)
        digest = hashlib.sha256(f"{key}/{block_start}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16])))
        values = generator.standard_normal((num_rows, *row_shape), dtype=np.float32)
        first = max(block_start, rows.start)
        yield first, values[first - block_start : rows.stop - block_start]
