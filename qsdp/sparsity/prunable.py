"""Which weights a compression method may prune.

The prunable set is the 2-D weights of the linear layers inside a model's blocks, and the 3-D ones
of experts that are fused into one parameter: pruning embeddings, head, norms or biases costs
accuracy and saves little (GMP*, arXiv 2210.06384).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from qsdp.common.rank_agreement import warn
from qsdp.common.spread import Spread, spread_of
from qsdp.compat.parameter_names import named_parameters
from qsdp.compat.resharding import reshard
from qsdp.compat.sharded_parameters import sharded_by_unsharded_id, sharded_parameters
from qsdp.ops.reference.magnitude import DTYPES
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import LocalShard, local_shard

_UNSAID = 0.1
"""The share of the blocks' weights that may stay out of a default set without a word."""


def prunable_parameters(
    model: nn.Module, patterns: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Choose by name the prunable parameters.

    Frees the gathered weights of an FSDP2 model, so that what is returned are its shards.

    Args:
        model: Any module, sharded or not.
        patterns: Shell-style patterns of full parameter names as the model was written, whatever
            wraps it or its blocks by now (``torch.compile``, activation checkpointing, DDP), for
            instance ``["blocks.*.mlp.*.weight"]``. By default, inside an ``nn.ModuleList`` (the
            blocks), or an ``nn.ModuleDict`` of numbered ones, the weights of ``nn.Linear`` and of
            Hugging Face's ``Conv1D``, and all parameters of three dimensions above 1 (experts), but
            those of convolutions, parametrized ones and biases, unless an embedding owns them too.
            A UserWarning names the weights of blocks that the default leaves out, if they are more
            than a tenth.

    Returns:
        Parameters by such a name, in the order of ``named_parameters``, tied ones once.

    Raises:
        ValueError: A pattern matches nothing, or no pattern is given and nothing is found; or
            two parameters have one name without those of wrappers.
    """
    reshard(model)
    named = named_parameters(model)
    if patterns is not None:
        if isinstance(patterns, str):
            raise ValueError(
                f"the prunable patterns are the text {patterns!r}: give a list of texts."
            )
        for pattern in patterns:
            if not fnmatch.filter(named, pattern):
                such = next(iter(named), None)
                advice = (
                    f"a pattern of names such as {such!r}" if such else "a model with parameters"
                )
                raise ValueError(
                    f"the prunable pattern {pattern!r} matches no parameter: give {advice}."
                )
        return {
            name: parameter
            for name, parameter in named.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
    in_blocks = {
        id(parameter): (module, name, parameter)
        for blocks in model.modules()
        if _is_blocks(blocks)
        for module in blocks.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    taken = {key for key, place in in_blocks.items() if _is_matrix(*place)} - embeddings
    chosen = {name: p for name, p in named.items() if id(p) in taken}
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no linear layers and no experts inside an nn.ModuleList "
            "of blocks, or a numbered nn.ModuleDict: name the parameters to prune by patterns."
        )
    weights = {
        name: p
        for name, p in named.items()
        if id(p) in in_blocks and p.ndim > 1 and "bias" not in re.split(r"[._]", name)
    }
    _warn_of_the_rest(model, weights, chosen)
    return chosen


def _is_blocks(module: nn.Module) -> bool:
    """Whether ``module`` holds a model's blocks, by numbers; torchtitan's is a dictionary."""
    is_numbered = isinstance(module, nn.ModuleDict) and all(n[-1:].isdigit() for n in module)
    return isinstance(module, nn.ModuleList) or is_numbered


def _is_matrix(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether ``parameter``, which ``module`` calls ``name``, is a matrix, or several."""
    if _is_linear(module):
        return name == "weight" and parameter.ndim == 2
    others = nn.Conv1d | nn.ConvTranspose1d | ParametrizationList
    if isinstance(module, others) or "bias" in name.split("_"):
        return False
    return parameter.ndim == 3 and min(parameter.shape) > 1


def _warn_of_the_rest(
    model: nn.Module, weights: Mapping[str, nn.Parameter], chosen: Mapping[str, nn.Parameter]
) -> None:
    """Say which ``weights`` of the blocks are not ``chosen``, if they are many."""
    total = sum(parameter.numel() for parameter in weights.values())
    left: dict[str, int] = {}
    for name, parameter in weights.items():
        if name not in chosen:
            anywhere = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            left[anywhere] = left.get(anywhere, 0) + parameter.numel()
    if sum(left.values()) > _UNSAID * total:
        largest = sorted(left, key=lambda name: -left[name])
        told = ", ".join(f"{name} ({left[name] / total:.0%})" for name in largest[:5])
        more = f" and {len(largest) - 5} more" if len(largest) > 5 else ""
        warn(
            f"{sum(left.values()) / total:.0%} of the weights in the blocks of "
            f"{type(model).__name__} are not in the default prunable set, and stay dense, "
            f"namely {told}{more}: give patterns of the names of all that may be pruned."
        )


@dataclass(frozen=True)
class Prunable:
    """The prunable parameters of a model, ready to be looked at shard by shard."""

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
                    "shard another one."
                )


def input_dims(model: nn.Module) -> dict[int, int]:
    """The dimension that a prunable weight's layer sums over, by the id of the weight.

    Where the weight is gathered now, it is the id of its shard. The dimension is 0 in Hugging
    Face's Conv1D.
    """
    sharded = sharded_by_unsharded_id(model)
    return {
        id(sharded.get(id(module.weight), module.weight)): 0 if _is_conv1d(module) else 1
        for module in model.modules()
        if _is_linear(module)
    }


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that transformers need not be installed.
    return "Conv1D" in {cls.__name__ for cls in type(module).__mro__}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)
