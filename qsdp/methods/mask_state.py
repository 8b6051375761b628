"""Masks in an optimizer's state.

They are bool tensors that torch's own loading would spoil, and that belong to the parameters they
were made of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qsdp.sparsity.prunable import Prunable

MASK = "mask"


def mask_of(state: Mapping[Tensor, Mapping[str, Any]], parameter: Tensor) -> Tensor:
    """The mask of ``parameter`` in an optimizer's ``state``; one that keeps all if it has none."""
    mask: Tensor | None = state.get(parameter, {}).get(MASK)
    return torch.ones_like(parameter, dtype=torch.bool) if mask is None else mask


def step_without_masks(base: torch.optim.Optimizer) -> None:
    """Step ``base`` and hide the masks in its state meanwhile.

    torch's optimizers make a state only where there is nothing yet.
    """
    masks = {p: state.pop(MASK) for p, state in base.state.items() if MASK in state}
    try:
        base.step()
    finally:
        for parameter, mask in masks.items():
            base.state[parameter][MASK] = mask


def split_masks(
    state_dict: Mapping[str, Any], parameters: Sequence[Tensor]
) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """An optimizer's ``state_dict`` without its masks, and these, each with its parameter.

    Torch gives what it loads the parameter's dtype, and takes a state with nothing but a mask for a
    damaged one. ``parameters`` are those of the optimizer, in its order.
    """
    states = state_dict["state"]
    # Numbers, or names under DCP; their order is that of the parameters.
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    masks = [
        (parameter, states[key][MASK])
        for parameter, key in zip(parameters, keys, strict=False)
        if MASK in states.get(key, {})
    ]
    rest = {
        key: {name: value for name, value in state.items() if name != MASK}
        for key, state in states.items()
    }
    return {**state_dict, "state": rest}, masks


def check_masks(
    masked: Collection[int],
    saved_names: Sequence[str] | None,
    prunable: Mapping[int, str],
    trained: Sequence[str],
    owner: str,
) -> None:
    """Raise ValueError if masks of a state that is to be loaded are not of the prunable parameters.

    Args:
        masked: The ``id`` of each parameter that would get a mask.
        saved_names: Names of the parameters whose masks were saved; None from DCP, which puts them
            in their places by name and brings none.
        prunable: Names of the prunable parameters by ``id``, in the optimizer's order.
        trained: Names of those that are trained now, in the same order.
        owner: The optimizer, by its class.
    """
    own = f"this {owner}"
    found = [name for key, name in prunable.items() if key in masked]
    is_in_place = len(found) == len(masked) and {*trained} <= {*found}
    if is_in_place and saved_names in (None, found):
        return
    names = trained if saved_names is None else saved_names
    extra = [name for name in names if name not in prunable.values()]
    missing = [name for name in trained if name not in names]
    if extra or missing:
        told = [f"no mask of {_first(missing)}"] if missing else []
        told += [f"a mask of {_first(extra)} that {own} does not prune"] if extra else []
        mistake = f"the state has {' and '.join(told)}: make it with the same prunable set."
    elif saved_names is not None and len(masked) == len(saved_names):
        pairs = zip(saved_names, trained, strict=False)
        moved = [f", {was} where {own} has {now}" for was, now in pairs if was != now]
        mistake = (
            f"the state has the masks of {own} in other places{''.join(moved[:1])}, since the "
            "base optimizer's parameters stand in another order: make it as it was, or save and "
            "load with DCP's get_optimizer_state_dict, which goes by name."
        )
    else:
        mistake = (
            f"the state's {len(masked)} masks are of other parameters than the {len(trained)} "
            f"that {own} prunes: make it with the same prunable set."
        )
    raise ValueError(mistake)


def masked_names_by_id(prunable: Prunable, parameters: Sequence[Tensor]) -> dict[int, str]:
    """The names of parameters that may have masks in a state, by ``id``, in that order."""
    pairs = zip(prunable.parameters, prunable.names, strict=True)
    names = {id(parameter): name for parameter, name in pairs}
    return {id(p): names[id(p)] for p in parameters if id(p) in names}


def _first(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
