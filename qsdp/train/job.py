"""A run that is ready to take its next step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qsdp
from qsdp import checkpoint
from qsdp.common.collective_errors import is_failure
from qsdp.common.printing import print_error, printable
from qsdp.common.user_errors import UserError, quoted
from qsdp.compat.sharded_parameters import sharded_parameters
from qsdp.data.batches import Batches
from qsdp.data.corpus import Corpus
from qsdp.methods.nonfinite import first_not_finite
from qsdp.models.language_model import LanguageModel
from qsdp.report.metrics import MetricsWriter
from qsdp.train.auto.choose import Choice
from qsdp.train.config import TrainConfig
from qsdp.train.history import CHECKPOINTS, METRICS, HistoryFolder
from qsdp.train.kept_model import KeptModel
from qsdp.train.lock import Lock
from qsdp.train.resume import launch_id
from qsdp.train.validate import Evaluator
from qsdp.train.wire_bytes import Wire
from qsdp.train.world import World

# The numbers that every line of metrics.jsonl has; a validation adds more.
STEP_METRICS = (
    *("loss", "lr", "grad_norm", "step_s", "tokens_per_s", "tokens"),
    *("wire_bytes_sent", "wire_bytes_other", "wire_bytes_fp32"),
)


@dataclass
class Job:
    """A run that is ready to take its next step."""

    config: TrainConfig
    world: World
    corpus: Corpus
    batches: Batches
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    handle: qsdp.Handle | None
    wire: Wire
    evaluator: Evaluator
    fingerprint: dict[str, Any]
    """What tells the run from others: all that changes its numbers."""
    results: HistoryFolder
    lock: Lock | None
    """The lock of the folder of results, on rank 0."""
    steps_done: int
    pace_since: int
    """The step after which batch, wire, precision, optimizer and world have been as they are now.
    Times and bytes of earlier steps are another run's.
    """
    recovered: int | None = None
    """The step after which TensorBoard may lack the history's lines."""
    metrics: MetricsWriter | None = None
    """The metrics file, on rank 0, once it is open."""
    has_checkpoint: bool = False
    """Whether this process has written one."""
    is_settled: bool = False
    """Whether what the first of them decided on has been done."""
    skipped_steps: int = 0
    """Steps of the run so far that were not finite."""
    bad_in_row: int = 0
    """How many of them were the last ones, those before a resume included."""
    last_bad: str | None = None
    """What was not finite in the last step; None if it was taken."""
    damaged: set[Path] = field(default_factory=set)
    """Checkpoints and kept models, by their real paths, that are as if they were not there."""
    saver: checkpoint.AsyncSaver | None = None
    """What saves beside training, with --save-async."""
    choice: Choice | None = None
    """What --qsdp-bits auto came to when the run began."""

    @property
    def out(self) -> Path:
        """The folder of results."""
        return self.config.out_dir

    @property
    def same_command(self) -> str:
        """What goes on from the checkpoints of this run, in words."""
        return "the same command" + " with --resume auto" * (self.config.output.resume == "none")

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.world.is_main:
            print(printable(text), flush=True)

    @property
    def has_mistake(self) -> bool:
        """Whether this rank has something to say in ``check``."""
        return self.corpus.mistake() is not None

    def check(self) -> None:
        """Raise ValueError for tokens that cannot be."""
        self.corpus.check()

    def open_metrics(self) -> None:
        """Open the metrics file, on rank 0. Raises UserError everywhere if it cannot be written."""
        results = self.results
        is_late = results.is_beside or self.recovered is not None
        events = None if is_late else self._events
        past = self.out / METRICS if results.start.has_past else None

        def make() -> MetricsWriter | None:
            if not self.world.is_main:
                return None
            path = results.path(METRICS)
            metrics = MetricsWriter(
                path, self.steps_done, events, STEP_METRICS, past, may_appear=self.check_lock
            )
            if self.recovered is not None and not results.is_beside:
                metrics.moved(path, self._events, self.recovered)
            return metrics

        self.metrics = self.world.together(make)

    def count_step(self, bad: str | None) -> None:
        """Count a step; it was skipped if ``bad`` says what was not finite."""
        self.steps_done += 1
        self.last_bad = bad
        self.skipped_steps += bad is not None
        self.bad_in_row = 0 if bad is None else self.bad_in_row + 1

    @property
    def has_failed(self) -> bool:
        """Whether --max-bad-steps steps in a row were skipped."""
        return self.bad_in_row >= self.config.run.max_bad_steps

    def check_bad_steps(self) -> None:
        """Raise UserError, on every rank, if the run ``has_failed``."""
        if not self.has_failed:
            return
        self.wait_saved()
        first, last = self.steps_done - self.bad_in_row + 1, self.steps_done
        steps = f"step {last}" if first == last else f"steps {first} to {last}"
        raise UserError(
            f"--max-bad-steps is {self.config.run.max_bad_steps}, and {steps} had no finite loss "
            f"and gradient (not finite in step {last}: {self.last_bad}), "
            f"{self.world.on_main(self._way_out)}.",
            is_shared=True,
        )

    def _way_out(self) -> str:
        """The last checkpoint, and what to do, of a run whose numbers are not finite any more."""
        start, root = self.results.start, self.out / CHECKPOINTS
        # A signal in a row of bad steps, or the end of the run, is saved beside what was good.
        good = self.steps_done - self.bad_in_row
        is_ours = not self.results.is_beside
        path = checkpoint.latest(root, good, without=self.damaged) if is_ours else None
        if path is None and start.meta is not None and start.meta["step"] <= good:
            path = start.source
        change = "a lower --lr or --clip-grad"
        if path is None:
            return f"and there is no checkpoint yet: begin anew with {change}"
        return f"and the last good checkpoint is {path}: go on from it by --resume with {change}"

    def save(self) -> None:
        """Write the checkpoint of the steps done.

        With --save-async all but the first are written beside training. The first one decides what
        becomes of other histories' files. In a row of bad steps no earlier one goes.
        """
        # Whoever finds the checkpoint finds the lines of its steps.
        if self.metrics is not None:
            self.metrics.sync()
        root = self.out / CHECKPOINTS
        saver = self.saver if self.has_checkpoint else None
        keep = sys.maxsize if self.bad_in_row else self.config.output.keep
        self._write(root, self.steps_done, self.optimizer, {}, keep, saver)
        self.has_checkpoint = True
        self.settle()

    def settle(self) -> None:
        """Do what the first checkpoint of this process has decided on, if that is still to do."""
        if not self.has_checkpoint or self.is_settled:
            return
        removed = self.world.on_main(self._settle)
        self.is_settled = removed is not None
        self.results.is_beside &= not self.is_settled
        if removed:
            self.say(f"Removed from {self.out}, as outdated now: {', '.join(removed)}")

    def wait_saved(self) -> None:
        """Wait until the last checkpoint is there. Raises UserError everywhere if it cannot be."""
        if self.saver is not None:
            with _failures_told():
                self.saver.wait()

    def validation_loss(self) -> float:
        """The validation loss of the exact weights, in nats a token."""
        return self.evaluator.loss()

    def zero_fraction(self) -> float:
        """The fraction of the prunable weights that are zero."""
        return self.evaluator.sparsity()["prunable"]

    def kept_model(self, folder: str) -> KeptModel:
        """What a method keeps in ``folder``."""

        def write(steps_done: int, loss: float) -> None:
            self._write(self.results.path(folder), steps_done, None, {"val_loss": loss}, 1)

        return KeptModel(folder, self.world, self.results, self.damaged, write)

    def _write(
        self,
        root: Path,
        steps_done: int,
        optimizer: torch.optim.Optimizer | None,
        more: dict[str, Any],
        keep: int,
        saver: checkpoint.AsyncSaver | None = None,
    ) -> None:
        """Write a checkpoint into ``root``, with ``more`` beside the rest, or let ``saver`` do so.

        Raises UserError, on every rank, if that fails, the one before has failed, or the weights or
        the optimizer's state are not finite.
        """
        self.wait_saved()
        self.world.together(lambda: self._check_before_saving(steps_done, optimizer))
        tokenizer, start = self.corpus.tokenizer, self.results.start
        meta = {
            "fingerprint": self.fingerprint,
            "config": self.config.as_dict(),
            "wire": None if self.handle is None else self.handle.state_dict(),
            "world_size": self.world.size,
            "pace_since": self.pace_since,
            "history": start.history,
            "went_on_from": start.went_on_from,
            "origin": start.origin,
            "launch": launch_id(),
            "choice": None if self.choice is None else asdict(self.choice),
            "skipped_steps": self.skipped_steps,
            "bad_in_row": self.bad_in_row,
        }
        files = {} if tokenizer is None else {"tokenizer.json": tokenizer.to_json()}
        save = checkpoint.save if saver is None else saver.save
        damaged = [path for path in self.damaged if path.parent == root.resolve()]
        with _failures_told():
            save(
                *(root, steps_done, self.model, optimizer, meta | more),
                tensors={} if optimizer is None or self.handle is None else self.handle.grids(),
                files=files,
                keep=keep,
                damaged=damaged,
                may_appear=self.check_lock,
            )
        self.damaged.difference_update(damaged)
        if damaged:
            names = ", ".join(sorted(f"{root.name}/{path.name}" for path in damaged))
            self.say(f"Removed from {self.out}, as damaged: {names}")

    def _check_before_saving(
        self, steps_done: int, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.check_lock()
        parameters = sharded_parameters(self.model)
        tensors: dict[str, Tensor] = parameters | dict(self.model.named_buffers())
        states: Any = {} if optimizer is None else optimizer.state
        for name, parameter in parameters.items():
            for key, value in states.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{key} of {name}"] = value
        bad = first_not_finite(tensors)
        if bad is not None:
            raise ValueError(
                f"{bad} is not finite on rank {self.world.rank} after step {steps_done}, from "
                f"which no training recovers, so that no checkpoint is written, {self._way_out()}."
            )

    def check_lock(self) -> None:
        """Raise ValueError, on rank 0, if the folder of results is another run's now."""
        if self.lock is not None:
            self.lock.check()

    def _settle(self) -> list[str] | None:
        """What was removed, on rank 0; None if it cannot be yet: the next save or start will."""
        was_beside = self.results.is_beside
        try:
            removed = self.results.settle()
        except OSError as error:
            print_error(
                f"warning: what is outdated in {self.out} cannot be removed yet "
                f"({quoted(error)}), so the next checkpoint or start tries again, and until then "
                f"the metrics are in {self.results.path(METRICS).name}."
            )
            return None
        if self.metrics is not None and was_beside:
            self.metrics.moved(self.out / METRICS, self._events, self.results.start.went_on_from)
        return removed

    @property
    def _events(self) -> Path | None:
        return self.out / "tensorboard" if self.config.output.tensorboard else None


@contextmanager
def _failures_told() -> Iterator[None]:
    """Inside, a checkpoint is written; what fails on all ranks alike is the user's to correct."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if is_failure(error):
            raise
        raise UserError(str(error), is_shared=True) from error
