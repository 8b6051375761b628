"""The shards that optimizers hold, also of parameters that are gathered now."""

from __future__ import annotations

from torch import nn

from qsdp.compat.fsdp_state import with_enclosing_roots
from qsdp.compat.parameter_group import parameter_groups
from qsdp.compat.parameter_names import named_parameters


def sharded_by_unsharded_id(model: nn.Module) -> dict[int, nn.Parameter]:
    """The sharded parameters that optimizers hold, by the ``id`` of the gathered ones.

    Modules show that one as long as it is gathered.
    """
    return {
        id(unsharded): sharded
        for whole in with_enclosing_roots(model)
        for group in parameter_groups(whole)
        for unsharded, sharded in zip(
            group.unsharded_parameters(), group.sharded_parameters(), strict=True
        )
        if unsharded is not None
    }


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """``named_parameters``, where those that are gathered now are their sharded ones."""
    sharded = sharded_by_unsharded_id(model)
    return {name: sharded.get(id(p), p) for name, p in named_parameters(model).items()}
