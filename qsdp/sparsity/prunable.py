"""Which weights a compression method may prune.

The prunable set is the 2-D weights of the linear layers inside a model's blocks: pruning
embeddings, head, norms or biases costs accuracy and saves little (GMP*, arXiv 2210.06384).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from qsdp.compat import named_parameters, reshard


def prunable_parameters(
    model: nn.Module, patterns: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Choose the parameters that may be pruned, by name.

    Frees the gathered weights of an FSDP2 model, so that what is returned are its shards.

    Args:
        model: Any module, sharded or not.
        patterns: Shell-style patterns of full parameter names as the model was written, whatever
            wraps it or its blocks by now (`torch.compile`, activation checkpointing, DDP), for
            instance ``["blocks.*.mlp.*.weight"]``. By default the weights of `nn.Linear` and of
            Hugging Face's `Conv1D` inside an `nn.ModuleList` (the blocks), unless an embedding
            owns them too.

    Returns:
        Parameters by such a name, in the order of `named_parameters`, tied ones once.

    Raises:
        ValueError: If a pattern matches nothing, or no pattern is given and nothing is found; or
            two parameters have one name without those of wrappers.
    """
    reshard(model)
    named = named_parameters(model)
    if patterns is not None:
        if isinstance(patterns, str):
            raise ValueError(
                f"the prunable patterns are the text {patterns!r}; give a list of texts"
            )
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


def input_dims(model: nn.Module) -> dict[int, int]:
    """By the id of a weight, the dimension that its layer sums over: 0 in Hugging Face's Conv1D."""
    return {
        id(module.weight): 0 if _is_conv1d(module) else 1
        for module in model.modules()
        if _is_linear(module)
    }


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that transformers need not be installed.
    return "Conv1D" in {cls.__name__ for cls in type(module).__mro__}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)
