"""What the modules of a model say of its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from qsdp.compat.parameter_names import unwrapped


def embedding_names(model: nn.Module) -> set[str]:
    """Names of the embeddings and the output heads of ``model``.

    They are the weights of every nn.Embedding, and of every nn.Linear outside the blocks with as
    many outputs as an embedding has rows.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    rows = {table.num_embeddings for table in tables}
    heads = [linear for linear in _linears_outside_blocks(model) if linear.out_features in rows]
    found = {id(module.weight) for module in (*tables, *heads)}
    return {name for name, p in model.named_parameters() if id(p) in found}


def _linears_outside_blocks(module: nn.Module) -> Iterator[nn.Linear]:
    """The linears outside of blocks.

    Blocks are the entries of containers, except linears and what has an embedding inside.
    """
    if isinstance(module, nn.Linear):
        yield module
    is_container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    for child in module.children():
        has_table = any(isinstance(m, nn.Embedding) for m in child.modules())
        if not is_container or has_table or isinstance(unwrapped(child), nn.Linear):
            yield from _linears_outside_blocks(child)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Which parameters ``model`` ties: their further names, each with the one listed first."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if name != first[id(p)]}


def unique_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The ``tensors`` of a model in order, a tied one (the same object twice) once."""
    return list({id(tensor): tensor for tensor in tensors}.values())
