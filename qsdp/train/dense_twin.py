"""The dense twin of AC/DC's sparse model: the best weights of the last dense phase."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from qsdp import checkpoint
from qsdp.common.printing import print_error
from qsdp.common.user_errors import UserError
from qsdp.train.history import damage
from qsdp.train.job import Job


def consider(job: Job, steps_done: int, loss: float | None = None) -> None:
    """Keep the weights, of validation loss `loss`, if they are dense and the best of the last dense
    phase. Called on all ranks alike; without `loss` it is measured."""
    last_dense = job.config.acdc_schedule(job.config.steps).last_dense_steps()
    if steps_done - 1 not in last_dense:
        return
    if (zeros := _pruned(job)) > 0:
        job.why_no_twin = f"{zeros:.0%} of the prunable weights were zero in the last dense phase"
        return
    loss = job.evaluator.loss() if loss is None else loss
    kept = kept_loss(job)
    if math.isfinite(loss) and (kept is None or loss < kept):
        job.keep_twin(steps_done, loss)
    elif kept is None:
        job.why_no_twin = "the validation loss was not finite in the last dense phase"


def _pruned(job: Job) -> float:
    """The fraction of the prunable weights that is zero; 0 where the model is dense. The step
    does not tell: the phase's last ends with new masks, and after skipped ones the weights are
    still those of the phase before."""
    target = job.config.acdc_compression.fraction
    # A dense model may have a zero by chance, a pruned one has as many as its target says.
    zeros = job.evaluator.sparsity()["prunable"]
    return zeros if zeros > target / 2 else 0.0


def kept_loss(job: Job) -> float | None:
    """The validation loss of the dense twin that the run has kept so far; None without one. A
    collective; rank 0 says of one that is damaged or cannot be read that it counts as none."""
    world = job.world
    try:
        while path := world.on_main(lambda: job.results.latest_twin(job.damaged)):
            error = None if job.has_twin else damage(path, world)
            if error is None:
                return world.on_main(partial(_loss, path))
            job.damaged.add(path.resolve())
            job.why_no_twin = f"{error.file} is damaged: {error.why}"
            if world.is_main:
                print_error(
                    f"warning: {job.why_no_twin}. The dense twin of step "
                    f"{checkpoint.step_of(path)} counts as none"
                )
    except UserError as error:
        job.why_no_twin = f"it cannot be read ({error})"
        if world.is_main:
            print_error(f"warning: the dense twin in {job.out} cannot be read ({error})")
    return None


def _loss(path: Path) -> float:
    loss = checkpoint.read_meta(path).get("val_loss")
    if not isinstance(loss, float | int):
        raise ValueError(f"{path} states no validation loss")
    return float(loss)
