"""GMP: gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qsdp.methods.construct_on_all_ranks import collective_constructor
from qsdp.methods.gmp.schedule import GMPSchedule
from qsdp.methods.masked import MaskedOptimizer
from qsdp.sparsity.compression_target import Compression


class GMP(MaskedOptimizer):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878; GMP*, arXiv 2210.06384).

    The mask is renewed at growing sparsity, by the cubic schedule. Pruned weights stay pruned.
    """

    @collective_constructor
    def __init__(
        self,
        model: nn.Module,
        base_optimizer: torch.optim.Optimizer,
        *,
        schedule: GMPSchedule,
        scope: str = "global",
        max_norm: float | None = None,
        prunable: Sequence[str] | None = None,
    ) -> None:
        """Wrap ``base_optimizer``, made of the parameters of ``model``.

        Args:
            model, base_optimizer, max_norm, prunable: As for ``ACDC``.
            schedule: When weights are pruned, and which fraction.
            scope: Which weights compete: ``global`` or ``layer``, as in ``Compression.scope``.

        Raises:
            ValueError: A value is out of range, or the optimizer lacks prunable parameters.
            RuntimeError: Ranks that share the model give other values.
        """
        if not isinstance(schedule, GMPSchedule):
            raise ValueError(f"the schedule is {schedule!r}: give a GMPSchedule.")
        target = Compression(sparsity=schedule.sparsity, scope=scope)  # checks both
        plan = f"{schedule}, {scope}"
        super().__init__(model, base_optimizer, plan=plan, max_norm=max_norm, prunable=prunable)
        self.prunable.check(target)
        self.schedule = schedule
        self.scope = scope

    def _is_masked(self, step: int) -> bool:
        return self.schedule.is_pruned(step)

    def _pruned_fraction(self, steps_done: int) -> float:
        return self.schedule.sparsity_at(steps_done)

    def _update_masks(self, steps_done: int) -> None:
        sparsity = self.schedule.sparsity_after(steps_done)
        if sparsity is not None:
            # A pruning may begin with nothing pruned, for which there is no scope.
            scope = self.scope if sparsity else "global"
            self._renew_masks(Compression(sparsity=sparsity, scope=scope))
