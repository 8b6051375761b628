"""Which values of the parameters travel when a support is set: those that its masks keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qsdp.common.checksum import checksum
from qsdp.simulation.simulated_shards import SimulatedSharding


class KeptWeights:
    """The weights that a support keeps; all others are zero and do not travel.

    Args:
        masks: The bool mask of each whole parameter, by name; what has none travels whole.
        sharding: How masks are cut, which is how parameters are.
    """

    def __init__(self, masks: Mapping[str, Tensor], sharding: SimulatedSharding) -> None:
        self._rows = {name: sharding.cut(name, mask) for name, mask in masks.items()}
        self.sums = {name: checksum([mask]) for name, mask in masks.items()}
        """By the name of a parameter that has a mask, what tells that from others."""

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def pick(self, name: str, row: Tensor, rank: int) -> Tensor:
        """What travels of a row that ``rank`` owns: all, or the kept values, 1-D."""
        return row[self._rows[name][rank]] if name in self else row

    def spread(self, name: str, values: Tensor, rank: int) -> Tensor:
        """The inverse of ``pick``, with zeros."""
        if name not in self:
            return values
        keep = self._rows[name][rank]
        zeros = torch.zeros(keep.shape, dtype=values.dtype, device=values.device)
        return zeros.masked_scatter_(keep, values)


def check_kept_masks(masks: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError if a mask of kept weights is no bool tensor of its parameter's shape."""
    for name, mask in masks.items():
        if name not in shapes:
            raise ValueError(
                f"a mask is given for {name!r}, which is no parameter of the model: give masks "
                "by the names of state()."
            )
        if type(mask) is not Tensor or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask of {name} is a {type(mask).__name__} of "
                f"{getattr(mask, 'dtype', None)}: give a bool tensor of the parameter's shape."
            )
        if mask.shape != shapes[name]:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, but the parameter has "
                f"{tuple(shapes[name])}: give a mask of that shape."
            )
