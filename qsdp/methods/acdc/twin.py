"""The dense twin of AC/DC's sparse model: the best weights of the last dense phase."""

from __future__ import annotations

import math

from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.method import Companion, MethodCheckpoint, MethodRun, Outcome


class DenseTwin(Companion):
    """Keeps the dense twin of a run of AC/DC: its best dense weights.

    The last chance for it is just before the last pruning; all that is validated before in that
    phase counts too.
    """

    def __init__(self, run: MethodRun, kept: MethodCheckpoint) -> None:
        assert isinstance(run.optimizer, ACDC)
        self._run, self._kept = run, kept
        self._target = run.optimizer.target.fraction
        self._last_dense = run.optimizer.schedule.last_dense_steps()
        kept.why_none = "the run went on from a checkpoint after the last dense phase"
        # Called inside the step, which is not counted yet.
        run.optimizer.before_pruning = lambda: self._consider(run.steps_done + 1)

    def after_validation(self, steps_done: int, loss: float) -> None:
        """Keep the weights, if they are the best dense ones so far."""
        self._consider(steps_done, loss)

    def outcome(self) -> Outcome:
        """The validation loss of what was kept, or why nothing was."""
        loss = self._kept.loss()
        remark = f"No dense twin was kept: {self._kept.why_none}" if loss is None else None
        return Outcome({"dense_twin_val_loss": loss}, remark)

    def _consider(self, steps_done: int, loss: float | None = None) -> None:
        """Keep the weights, if they are dense and the best of the last dense phase.

        ``loss`` is their validation loss; without it, it is measured.
        """
        if steps_done - 1 not in self._last_dense:
            return
        # The step does not tell whether the model is dense: the phase's last ends with new masks,
        # and after skipped ones the weights are still those of the phase before. A dense model may
        # have a zero by chance, a pruned one has as many as its target says.
        if (zeros := self._run.zero_fraction()) > self._target / 2:
            self._kept.why_none = (
                f"{zeros:.0%} of the prunable weights were zero in the last dense phase"
            )
            return
        loss = self._run.validation_loss() if loss is None else loss
        kept = self._kept.loss()
        if math.isfinite(loss) and (kept is None or loss < kept):
            self._kept.keep(steps_done, loss)
        elif kept is None:
            self._kept.why_none = "the validation loss was not finite in the last dense phase"
