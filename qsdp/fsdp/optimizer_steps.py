"""How often optimizers have stepped a model's weights: gathered ones may be older than that."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from qsdp.compat.parameter_group import ParameterGroup


class OptimizerSteps:
    """Counts, in ``num``, the steps of optimizers that hold parameters of ``groups``.

    It does so whoever made them.
    """

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        self._groups = groups
        self.num = 0
        self._own: set[int] | None = None
        _COUNTING.add(self)

    def look_again(self) -> None:
        """Look for the parameters anew at the next step: others may have taken their place."""
        self._own = None

    def stop(self) -> None:
        """Count no more."""
        _COUNTING.discard(self)

    def _count(self, stepped: set[int]) -> None:
        if self._own is None:  # once a pass: some users have an optimizer a parameter
            self._own = {id(p) for group in self._groups for p in group.sharded_parameters()}
        self.num += not stepped.isdisjoint(self._own)


_COUNTING: WeakSet[OptimizerSteps] = WeakSet()


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for steps in _COUNTING:
        steps._count(stepped)


register_optimizer_step_post_hook(_count_step)  # one for all optimizers: it holds no model
