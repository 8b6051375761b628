"""The masks that ``Handle.set_support`` is given, checked and brought to their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qsdp.compat.parameter_group import ParameterGroup


def masks_by_place(
    masks: Mapping[nn.Parameter, Tensor], groups: Sequence[ParameterGroup]
) -> list[dict[int, Tensor]]:
    """The masks of a support, for each group, by their parameters' places in it.

    Raises ValueError if a mask is no bool tensor of its parameter's local shape, or is given for
    what none of ``groups`` holds.
    """
    for parameter, mask in masks.items():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if type(mask) is not torch.Tensor or mask.dtype != torch.bool:
            raise ValueError(
                f"a mask is a {type(mask).__name__} of {getattr(mask, 'dtype', None)}: give a "
                "bool tensor of the parameter's local shape (a DTensor's mask.to_local())."
            )
        if mask.shape != local.shape:
            raise ValueError(
                f"a mask has shape {tuple(mask.shape)}, but the local part of its parameter has "
                f"{tuple(local.shape)}: give a mask of that shape."
            )
    left = {id(parameter): (parameter, mask) for parameter, mask in masks.items()}
    chosen = [
        {
            place: left.pop(id(sharded.parameter))[1]
            for place, sharded in enumerate(group.parameters() if left else [])
            if id(sharded.parameter) in left
        }
        for group in groups
    ]
    for parameter, _ in left.values():
        raise ValueError(
            f"a mask is given for a tensor of shape {tuple(parameter.shape)} that FSDP2 does "
            "not shard in this model: give masks by the model's own parameters."
        )
    return chosen
