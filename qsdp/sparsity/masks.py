"""Which weights stay: masks of the largest magnitudes over shards, N:M patterns, blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qsdp.common.spread import Spread, spread_of
from qsdp.compat.sharded_parameters import sharded_parameters
from qsdp.ops.reference.magnitude import DTYPES, keys_of
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import LocalShard, Part, local_shard, unique, without_copies
from qsdp.sparsity.nm_groups import whole_groups
from qsdp.sparsity.prunable import input_dims, prunable_parameters
from qsdp.sparsity.threshold import Threshold, global_threshold, layer_thresholds, num_values


@dataclass(frozen=True)
class Prunable:
    """The parameters that a method may compress, ready to be looked at shard by shard."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    dims: tuple[int, ...]
    """The input dimension of each: what the products of its layer sum over."""
    spread: Spread
    """The spread of all the model's parameters."""

    @classmethod
    def of(cls, model: nn.Module, patterns: Sequence[str] | None = None) -> Prunable:
        """The prunable set of ``model``; see ``prunable_parameters``."""
        return cls._of(model, prunable_parameters(model, patterns))

    @classmethod
    def named(cls, model: nn.Module, names: Sequence[str]) -> Prunable:
        """The parameters of ``model`` that have these names now.

        Raises ValueError if there are none of a name.
        """
        named = sharded_parameters(model)
        missing = [name for name in names if name not in named]
        if missing:
            raise ValueError(
                f"{type(model).__name__} has no parameter of its own called {missing[0]!r} any "
                "more, which was in the prunable set and was renamed, removed or tied to another: "
                "make the optimizer anew."
            )
        return cls._of(model, {name: named[name] for name in names})

    @classmethod
    def _of(cls, model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> Prunable:
        dims = input_dims(model)
        return cls(
            tuple(chosen),
            tuple(chosen.values()),
            tuple(dims.get(id(p), p.ndim - 1) for p in chosen.values()),
            spread_of(sharded_parameters(model).values()),
        )

    def trained(self) -> Prunable:
        """The parameters that are not frozen."""
        kept = [i for i, parameter in enumerate(self.parameters) if parameter.requires_grad]
        return replace(
            self,
            names=tuple(self.names[i] for i in kept),
            parameters=tuple(self.parameters[i] for i in kept),
            dims=tuple(self.dims[i] for i in kept),
        )

    def shards(self) -> list[LocalShard]:
        """This rank's part of each, as it is now."""
        return [local_shard(parameter, self.spread) for parameter in self.parameters]

    def check(self, target: Compression) -> None:
        """Raise ValueError where a parameter cannot have the target.

        Its pattern, blocks or bits do not fit, or the parameter has a dtype whose magnitudes cannot
        be ranked.
        """
        for name, shard, dim in zip(self.names, self.shards(), self.dims, strict=True):
            size = target.group_size
            if (target.fraction or target.bits is not None) and shard.dtype not in DTYPES:
                raise ValueError(
                    f"{name} is {shard.dtype}, but only float32, bfloat16 and float16 are "
                    "compressed: convert it, or prune others by patterns of names."
                )
            if size > 1 and (len(shard.shape) != 2 or shard.shape[dim] % size):
                raise ValueError(
                    f"{name} has shape {tuple(shard.shape)}, whose input dimension {target} cannot "
                    f"cut into groups of {size}: prune others by patterns of names."
                )
            if size > 1 and len(shard.groups) > 1:
                raise ValueError(
                    f"{name} is sharded over {len(shard.groups)} mesh axes, but {target} needs "
                    "one: shard it over one."
                )
            if target.bits is not None and shard.shape and shard.parts[-1] != shard.shape[-1]:
                raise ValueError(
                    f"{name} is sharded by its last dimension, along which {target} rounds: "
                    "shard another dimension."
                )


def keep_masks(
    shards: Sequence[LocalShard], target: Compression, dims: Sequence[int]
) -> list[Tensor]:
    """Which values of each shard ``target`` keeps: bool of the local shape. A collective.

    Args:
        shards: Those of all tensors that compete, the same tensors in the same order on every rank.
        target: How many of them are kept, and in which shapes.
        dims: The input dimension of each, for patterns and blocks.
    """
    if target.pattern is not None:
        return [
            _pattern(shard, *target.pattern, dim) for shard, dim in zip(shards, dims, strict=True)
        ]
    if target.block == 1:
        threshold = find_threshold(shards, target)
        return [threshold.keep(i, shard) for i, shard in enumerate(shards)]
    blocks = [Blocks(shard, target.block, dim) for shard, dim in zip(shards, dims, strict=True)]
    threshold = find_threshold([block.owned for block in blocks], target)
    return [block.spread(threshold.keep(i, block.all)) for i, block in enumerate(blocks)]


def magnitude_masks(parameters: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep the largest magnitudes over all parameters together: exactly n - round(sparsity * n).

    A collective; see ``threshold.global_threshold`` for the ties.

    Args:
        parameters: Plain tensors or DTensors by name, the same order on every rank; a tensor that
            stands under two names counts once.
        sparsity: Fraction to prune, from 0 (nothing) to below 1.

    Returns:
        A bool mask of the local shape by name, True where the weight is kept.
    """
    tensors = unique(parameters.values())
    spread = spread_of(tensors)
    # No parameters: no rank knows which of them the others train.
    shards = [local_shard(tensor.detach(), spread) for tensor in tensors]
    masks = keep_masks(shards, Compression(sparsity=sparsity), [1] * len(shards))
    by_id = {id(tensor): mask for tensor, mask in zip(tensors, masks, strict=True)}
    return {name: by_id[id(tensor)] for name, tensor in parameters.items()}


def find_threshold(shards: Sequence[Part], target: Compression) -> Threshold:
    """The magnitudes above which the values, or the blocks' sums, stay. A collective."""
    if target.scope == "layer":
        numels = [shard.numel for shard in shards]
        return layer_thresholds(shards, [n - round(target.sparsity * n) for n in numels])
    shards = [without_copies(shard) for shard in shards]
    total = num_values(shards)
    return global_threshold(shards, total - round(target.sparsity * total))


def _pattern(shard: LocalShard, keep: int, size: int, dim: int) -> Tensor:
    """The ``keep`` largest of every ``size`` along ``dim``, of equal ones the first."""
    rows_GMR, first = whole_groups(shard, dim, size)
    order = keys_of(rows_GMR).sort(dim=1, descending=True, stable=True).indices
    mask_GMR = torch.zeros_like(rows_GMR, dtype=torch.bool).scatter_(1, order[:, :keep], True)
    return _own_part(mask_GMR, shard, dim, first)


def _own_part(mask_GMR: Tensor, shard: LocalShard, dim: int, first: int) -> Tensor:
    moved = shard.values.movedim(dim, 0)
    rows = mask_GMR.flatten(0, 1)[first : first + moved.shape[0]]
    return rows.reshape(moved.shape).movedim(0, dim)


class Blocks:
    """The blocks of one matrix as values of their own: the sums of their magnitudes."""

    def __init__(self, shard: LocalShard, size: int, dim: int) -> None:
        self._shard, self._dim, self._size = shard, dim, size
        rows_GMR, self._first = whole_groups(shard, dim, size)
        sums_GR = torch.zeros_like(rows_GMR[:, 0], dtype=torch.float32)
        for place in range(size):  # in this order on any number of ranks
            sums_GR += rows_GMR[:, place].abs()
        rest = 1 - dim
        begin = (shard.offset[dim] - self._first) // size
        shape = (shard.shape[dim] // size, shard.shape[rest])
        offset = (begin, shard.offset[rest])
        self.all = replace(shard, values=sums_GR, shape=shape, offset=offset, parts=shape)
        # A block that several ranks see is counted by the one that holds its first row.
        own = 1 if self._first else 0
        offset = (begin + own, shard.offset[rest])
        self.owned = replace(self.all, values=sums_GR[own:], offset=offset)

    def spread(self, keep_GR: Tensor) -> Tensor:
        """The mask of the matrix's local part that follows from the blocks' mask."""
        mask_GMR = keep_GR[:, None].expand(-1, self._size, -1)
        return _own_part(mask_GMR, self._shard, self._dim, self._first)
