"""AC/DC: alternating compressed and decompressed training (Peste et al., arXiv 2106.12379)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.construct_on_all_ranks import collective_constructor
from qsdp.methods.first_moments import FirstMoments
from qsdp.methods.mask_state import MASK
from qsdp.methods.masked import MaskedOptimizer
from qsdp.sparsity.compression_target import Compression


class ACDC(MaskedOptimizer):
    """Alternating compressed and decompressed training (Peste et al., arXiv 2106.12379).

    Entering a compressed phase, the mask keeps what ``target`` keeps of the weights (by default the
    largest magnitudes of all, exactly) and stays until the phase ends; entering a dense phase, the
    pruned weights train again from zero and the first moments of ALL parameters are set to zero.
    The second moments stay: Adam's bias correction knows nothing of a reset.

    It ends in the last compressed phase: the model is sparse. Its dense twin is the model at the
    end of the last dense phase; ``before_pruning`` sees it.
    """

    _has_checked_moments: bool

    @collective_constructor
    def __init__(
        self,
        model: nn.Module,
        base_optimizer: torch.optim.Optimizer,
        *,
        schedule: ACDCSchedule | int,
        target: float | str | Compression = 0.9,
        max_norm: float | None = None,
        prunable: Sequence[str] | None = None,
    ) -> None:
        """Wrap ``base_optimizer``, made of the parameters of ``model``.

        Args:
            model: The module whose weights are trained. Where it is sharded later, the sharded
                parameters must be in the base's ``param_groups`` at the first step.
            base_optimizer: Any optimizer whose ``step()`` needs no closure.
            schedule: The phases, or how many optimizer steps there will be.
            target: What a compressed phase keeps, as ``Compression.of`` reads it; no bits.
            max_norm: The norm that the (masked) gradient is clipped to; None for no clipping.
            prunable: Name patterns of the prunable set; see ``sparsity.prunable_parameters``.

        Raises:
            ValueError: A value is out of range, the optimizer lacks prunable parameters, or its
                first moments are of a class that cannot be set to zero.
            RuntimeError: Ranks that share the model give other values.
        """
        self.schedule = ACDCSchedule.of(schedule) if isinstance(schedule, int) else schedule
        self.target = _only_pruned(Compression.of(target))
        if not isinstance(self.schedule, ACDCSchedule):
            raise ValueError(f"the schedule is {schedule!r}: give steps (int) or an ACDCSchedule.")
        plan = f"{self.schedule} to {self.target}"
        super().__init__(model, base_optimizer, plan=plan, max_norm=max_norm, prunable=prunable)
        self.prunable.check(self.target)
        if self.num_steps == 0 and self._is_masked(0):
            raise ValueError(
                "the schedule has no warm-up, but AC/DC begins dense: give it 1 step or more."
            )
        self._moments = FirstMoments(self.base, type(self).__name__)

    def _is_masked(self, step: int) -> bool:
        return self.schedule.is_compressed(step)

    def _pruned_fraction(self, steps_done: int) -> float:
        return self.target.fraction if self._is_masked(steps_done - 1) else 0.0

    def _update_masks(self, steps_done: int) -> None:
        was, is_now = self._is_masked(steps_done - 1), self._is_masked(steps_done)
        if is_now and not was:
            self._renew_masks(self.target)
        elif was and not is_now:
            self._moments.zero_()
            self._lift_masks()

    def _check_begin(self) -> None:
        super()._check_begin()
        has_stepped = any(state.keys() - {MASK} for state in self.state.values())
        if not self._has_checked_moments and has_stepped:
            self._moments.check()
            self._has_checked_moments = True

    def _on_load(self, base: torch.optim.Optimizer) -> None:
        super()._on_load(base)
        self._has_checked_moments = False  # what was loaded may be of other classes


def _only_pruned(target: Compression) -> Compression:
    if target.bits is not None:
        raise ValueError(
            f"the target {target} has bits, but a mask rounds no weights: leave them out."
        )
    return target
