"""Which weights a compression method may prune, and magnitude masks over them.

The prunable set is the 2-D weights of the linear layers inside a model's blocks: pruning
embeddings, head, norms or biases costs accuracy and saves little (GMP*, arXiv 2210.06384).
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qsdp.sparsity.shards import LocalShard, local_shard, reshard, unique
from qsdp.sparsity.threshold import Threshold, global_threshold


def prunable_parameters(
    model: nn.Module, patterns: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Choose the parameters that may be pruned, by name.

    Frees the gathered weights of an FSDP2 model, so that what is returned are its shards.

    Args:
        model: Any module, sharded or not.
        patterns: Shell-style patterns of full parameter names, for instance
            ``["blocks.*.mlp.*.weight"]``. By default the weights of `nn.Linear` and of Hugging
            Face's `Conv1D` inside an `nn.ModuleList` (the blocks), unless an embedding owns them
            too.

    Returns:
        Parameters by the name that `named_parameters` gives them, in its order, tied ones once.

    Raises:
        ValueError: If a pattern matches nothing, or no pattern is given and nothing is found.
    """
    reshard(model)
    named = dict(model.named_parameters())
    if patterns is not None:
        for pattern in patterns:
            if not fnmatch.filter(named, pattern):
                raise ValueError(
                    f"the prunable pattern {pattern!r} matches no parameter; "
                    f"names look like {next(iter(named), 'nothing: the model has none')!r}"
                )
        return {
            name: parameter
            for name, parameter in named.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = {
        id(module.weight)
        for blocks in model.modules()
        if isinstance(blocks, nn.ModuleList)
        for module in blocks.modules()
        if _is_linear(module)
        and isinstance(module.weight, nn.Parameter)
        and module.weight.ndim == 2
    }
    chosen = {n: p for n, p in named.items() if id(p) in linears - embeddings}
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no linear layers inside an nn.ModuleList of blocks; "
            "name the parameters to prune by patterns"
        )
    return chosen


def magnitude_masks(parameters: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep the largest magnitudes over all parameters together: exactly n - round(sparsity * n).

    A collective; see `threshold.global_threshold` for the ties.

    Args:
        parameters: Plain tensors or DTensors by name, the same order on every rank; a tensor that
            stands under two names counts once.
        sparsity: Fraction to prune, from 0 (nothing) to below 1.

    Returns:
        By name a bool mask of the local shape, True where the weight is kept.
    """
    tensors = unique(parameters.values())
    shards = [local_shard(tensor) for tensor in tensors]
    threshold = magnitude_threshold(shards, sparsity)
    masks = {
        id(tensor): threshold.keep(i, shard)
        for i, (tensor, shard) in enumerate(zip(tensors, shards, strict=True))
    }
    return {name: masks[id(tensor)] for name, tensor in parameters.items()}


def magnitude_threshold(shards: Sequence[LocalShard], sparsity: float) -> Threshold:
    """The threshold that prunes round(sparsity * n) of all n values (a collective)."""
    check_sparsity(sparsity)
    total = sum(shard.numel for shard in shards)
    return global_threshold(shards, total - round(sparsity * total))


def prune_(shards: Sequence[LocalShard], threshold: Threshold) -> None:
    """Set what ``threshold`` does not keep to +0.0, in place."""
    for i, shard in enumerate(shards):
        # Not a product: -1 * 0 is -0.0 and NaN * 0 is NaN, neither of which is a zero on the wire.
        shard.values.masked_fill_(~threshold.keep(i, shard), 0)


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless ``sparsity`` is a fraction in [0, 1)."""
    if not (math.isfinite(sparsity) and 0 <= sparsity < 1):
        raise ValueError(f"sparsity is {sparsity}; choose a fraction from 0 to below 1")


@contextlib.contextmanager
def pruned(
    model: nn.Module, sparsity: float, patterns: Sequence[str] | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """Within the context, ``model`` is pruned one-shot by magnitude; afterwards it is as before.

    A collective, in place, restored bit for bit also when the body raises. Costs a copy of the
    prunable shards.

    Args:
        model: Any module, sharded or not; not in the middle of a forward or backward pass.
        sparsity: Fraction of the prunable weights to set to +0.0, from 0 to below 1.
        patterns: The prunable set, as in `prunable_parameters`.

    Yields:
        The pruned parameters by name.
    """
    parameters = prunable_parameters(model, patterns)
    shards = [local_shard(parameter) for parameter in parameters.values()]
    threshold = magnitude_threshold(shards, sparsity)
    before = [shard.values.clone() for shard in shards]
    try:
        with torch.no_grad():
            prune_(shards, threshold)
        yield parameters
    finally:
        reshard(model)
        with torch.no_grad():
            for shard, values in zip(shards, before, strict=True):
                shard.values.copy_(values)


def _is_linear(module: nn.Module) -> bool:
    # By name, so that transformers need not be installed: its Conv1D is a linear layer.
    classes = {cls.__name__ for cls in type(module).__mro__}
    return isinstance(module, nn.Linear) or "Conv1D" in classes
