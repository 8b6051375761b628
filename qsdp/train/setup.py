"""Everything before the first step: data, model, optimizer, and the checkpoint to go on from."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qsdp
from qsdp import checkpoint
from qsdp.common.streams import complain, printable
from qsdp.compat import sharded_parameters
from qsdp.data import Batches, Corpus, eval_batches, load_corpus
from qsdp.data.tokenizer import hash_of
from qsdp.methods.base import OptimizerWrapper
from qsdp.methods.finite import first_not_finite
from qsdp.metrics import MetricsWriter
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.model import GPT
from qsdp.ops import native
from qsdp.sparsity.compression import Prunable
from qsdp.train.agree import agree_on_config, agree_on_data
from qsdp.train.choose import Choice, choose
from qsdp.train.config import TrainConfig
from qsdp.train.errors import UserError, is_lost, sentence
from qsdp.train.evaluate import Evaluator
from qsdp.train.lock import Lock, hold, holder
from qsdp.train.parallelize import build, check_nodes, check_replicas, make_optimizer, model_config
from qsdp.train.results import CHECKPOINTS, DENSE_TWIN, METRICS, Results, Start, recover
from qsdp.train.resume import (
    changed,
    find_whole_start,
    is_finished,
    launch_id,
    pace_since,
    told_as_damaged,
)
from qsdp.train.wire import QuantizedWire, StockWire, Wire
from qsdp.train.wire_flags import AUTO
from qsdp.train.world import World, all_alike

# The numbers that every line of metrics.jsonl has; a validation adds more.
STEP_METRICS = (
    *("loss", "lr", "grad_norm", "step_s", "tokens_per_s", "tokens"),
    *("wire_bytes_sent", "wire_bytes_other", "wire_bytes_fp32"),
)
_SHARED_FOLDER_S = 10.0  # how long a network file system may take to show a new file


@dataclass
class Job:
    """A run that is ready to take its next step."""

    config: TrainConfig
    world: World
    corpus: Corpus
    batches: Batches
    model: GPT
    optimizer: torch.optim.Optimizer
    handle: qsdp.Handle | None
    wire: Wire
    evaluator: Evaluator
    fingerprint: dict[str, Any]
    """What tells the run from others: all that changes its numbers."""
    results: Results
    lock: Lock | None
    """Of the folder of results, on rank 0."""
    steps_done: int
    pace_since: int
    """The step after which batch, wire, precision, optimizer and world have been as they are now:
    times and bytes of earlier steps are another run's."""
    why_no_twin: str = "the run went on from a checkpoint after the last dense phase"
    """Of AC/DC, as long as nothing was kept."""
    recovered: int | None = None
    """The step after which TensorBoard may lack the history's lines."""
    metrics: MetricsWriter | None = None
    """On rank 0, once it is open."""
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
    has_twin: bool = False
    """Whether this process has written a dense twin."""
    damaged: set[Path] = field(default_factory=set)
    """Checkpoints and dense twins, by their real paths, that are as if they were not there."""
    saver: checkpoint.AsyncSaver | None = None
    """With --save-async."""
    choice: Choice | None = None
    """What --qsdp-bits auto came to when the run began."""

    @property
    def out(self) -> Path:
        return self.config.out_dir

    @property
    def same_command(self) -> str:
        """What goes on from the checkpoints of this run, in words."""
        return "the same command" + " with --resume auto" * (self.config.resume == "none")

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.world.is_main:
            print(printable(text), flush=True)

    @property
    def has_mistake(self) -> bool:
        """Whether this rank has something to say in `check`."""
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
        """Count a step, and that it was skipped if something was not finite, which `bad` names."""
        self.steps_done += 1
        self.last_bad = bad
        self.skipped_steps += bad is not None
        self.bad_in_row = 0 if bad is None else self.bad_in_row + 1

    @property
    def has_failed(self) -> bool:
        """Whether --max-bad-steps steps in a row were skipped."""
        return self.bad_in_row >= self.config.max_bad_steps

    def check_bad_steps(self) -> None:
        """Raise UserError, on every rank, if the run `has_failed`."""
        if not self.has_failed:
            return
        self.wait_saved()
        first, last = self.steps_done - self.bad_in_row + 1, self.steps_done
        steps = f"step {last}" if first == last else f"steps {first} to {last}"
        raise UserError(
            f"--max-bad-steps is {self.config.max_bad_steps}, and {steps} had no finite loss and "
            f"gradient: not finite in step {last} was {self.last_bad}; "
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
            return f"there is no checkpoint yet, so begin anew with {change}"
        return f"the last good checkpoint is {path}: go on from it by --resume with {change}"

    def save(self) -> None:
        """Write the checkpoint of the steps done; with --save-async from the second one on beside
        training. The first one decides what becomes of other histories' files. In a row of bad
        steps no earlier one goes."""
        # Whoever finds the checkpoint finds the lines of its steps.
        if self.metrics is not None:
            self.metrics.sync()
        root = self.out / CHECKPOINTS
        saver = self.saver if self.has_checkpoint else None
        keep = sys.maxsize if self.bad_in_row else self.config.keep
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
        """Wait until the last checkpoint is there. Raises UserError, on every rank, if it could not
        be written."""
        if self.saver is not None:
            with _failures_told():
                self.saver.wait()

    def keep_twin(self, steps_done: int, loss: float) -> None:
        """Write the weights, of validation loss `loss`, as the dense twin."""
        self._write(self.results.path(DENSE_TWIN), steps_done, None, {"val_loss": loss}, 1)
        self.has_twin = True

    def _write(
        self,
        root: Path,
        steps_done: int,
        optimizer: torch.optim.Optimizer | None,
        more: dict[str, Any],
        keep: int,
        saver: checkpoint.AsyncSaver | None = None,
    ) -> None:
        """Write a checkpoint into `root`, with `more` beside what all of them have, or let `saver`
        do it. Raises UserError, on every rank, if that fails, the one before has failed, or the
        weights or the optimizer's state are not finite."""
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
                f"which no training recovers, so that no checkpoint is written; {self._way_out()}."
            )

    def check_lock(self) -> None:
        """Raise ValueError, on rank 0, if the folder of results is another run's now."""
        if self.lock is not None:
            self.lock.check()

    def _settle(self) -> list[str] | None:
        """What was removed, on rank 0; None if it cannot be yet: the next save, and the next start,
        try again."""
        was_beside = self.results.is_beside
        try:
            removed = self.results.settle()
        except OSError as error:
            complain(
                f"warning: what is outdated in {self.out} cannot be removed yet "
                f"({sentence(error)}); the next checkpoint or start tries again, and until then "
                f"the metrics are in {self.results.path(METRICS).name}"
            )
            return None
        if self.metrics is not None and was_beside:
            self.metrics.moved(self.out / METRICS, self._events, self.results.start.went_on_from)
        return removed

    @property
    def _events(self) -> Path | None:
        return self.out / "tensorboard" if self.config.tensorboard else None


def set_up(config: TrainConfig, world: World, held: ExitStack) -> Job | None:
    """Build the job of `config` on all ranks; None if it is finished already, which is said.

    The folder of results is this run's until `held` is closed.
    Raises UserError, on every rank, for whatever the user can correct, and Told as `choose`.
    """
    agree_on_config(config, world)
    lock = _take_folder(config, world, held)
    world.together(lambda: check_replicas(config, world))
    world.together(lambda: check_nodes(config, world))
    corpus = world.together(lambda: _load_corpus(config))
    data = agree_on_data(corpus, world)
    size = world.together(lambda: model_config(config, corpus.vocab_size))
    batches = world.together(lambda: _make_batches(config, world, corpus))

    def fingerprint_of(config: TrainConfig) -> dict[str, Any]:
        return _fingerprint(config, size, corpus, data, world)

    removed, recovered = recover(config.out_dir, world)
    if removed and world.is_main:  # now: what follows may be refused
        print(f"Removed from {config.out_dir}, as outdated: {', '.join(removed)}", flush=True)
    start, damaged = find_whole_start(config, world, fingerprint_of)
    source, meta = start.source, start.meta
    if world.is_main:
        for line in told_as_damaged(start, damaged):
            complain(f"warning: {line}")
    if meta is not None and config.resume == "auto" and is_finished(config, meta):
        if world.is_main:
            # Who waits for the end of this start, as a job file does, sees that this is it.
            with suppress(OSError):
                os.utime(config.out_dir / "summary.json")
            print(
                f"{config.out_dir} holds this run, finished after {meta['step']} steps: nothing to "
                f"train. To go on, give more --steps and --resume {config.out_dir}; to train "
                "again, another --out, or --resume none."
            )
        return None

    config, choice = _settle_wire(config, size, world, start)
    sharded = world.together(lambda: build(config, size, world))
    model, handle = sharded.model, sharded.handle
    wire = StockWire(model, world, config.replicas) if handle is None else QuantizedWire(handle)
    world.together(lambda: _check_targets(config, model))
    optimizer = world.together(lambda: make_optimizer(config, model))
    if handle is not None and isinstance(optimizer, OptimizerWrapper):
        optimizer.share_support(handle.set_support)
    steps_done = 0
    if source is not None and meta is not None:
        all_alike(world, lambda: checkpoint.load(source, model, optimizer, is_checked=True))
        steps_done = meta["step"]
        if handle is not None and meta["wire"] is not None:
            load, state = handle.load_state_dict, meta["wire"]
            all_alike(world, lambda: load(state))
    comment = "" if choice is None else choice.comment
    results = Results(config.out_dir, comment + config.to_toml(), start)
    removed = world.on_main(results.begin)
    job = Job(
        config=config,
        world=world,
        corpus=corpus,
        batches=batches,
        model=model,
        optimizer=optimizer,
        handle=handle,
        wire=wire,
        evaluator=Evaluator(config, world, corpus, model, wire),
        fingerprint=fingerprint_of(config),
        results=results,
        lock=lock,
        recovered=recovered,
        damaged={error.checkpoint.resolve() for error in damaged},
        saver=held.enter_context(_saving_beside()) if config.save_async else None,
        choice=choice,
        steps_done=steps_done,
        skipped_steps=0 if meta is None else meta["skipped_steps"],
        bad_in_row=0 if meta is None else meta["bad_in_row"],
        pace_since=0 if meta is None else pace_since(config, world, meta),
    )
    _announce(job, source, meta, removed)
    return job


def _settle_wire(
    config: TrainConfig, size: GPTConfig, world: World, start: Start
) -> tuple[TrainConfig, Choice | None]:
    """The configuration with what --qsdp-bits auto comes to, and that choice: of a run that goes on
    the one that it has made, whatever the link is like by now."""
    meta = start.meta
    kept = None if meta is None or meta["choice"] is None else Choice(**meta["choice"])
    if kept is not None and kept.measured is None and world.size > 1:
        kept = None  # one rank had nothing to choose
    if config.qsdp_bits != AUTO:
        # Its flags, given by hand, go on with the same run.
        is_same = meta is not None and meta["history"] == start.history
        return config, kept if is_same else None
    choice = kept or choose(config, size, world)
    if world.is_main:
        again = " (as chosen when the run began)" * (kept is not None)
        print(f"{choice.line}{again}", flush=True)
    return config.resolved(choice.settings), choice


@contextmanager
def _failures_told() -> Iterator[None]:
    """Inside a checkpoint is written; what fails on all ranks alike is the user's to correct."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if is_lost(error):
            raise
        raise UserError(str(error), is_shared=True) from error


@contextmanager
def _saving_beside() -> Iterator[checkpoint.AsyncSaver]:
    """A saver that is waited for, whatever ends the run."""
    saver = checkpoint.AsyncSaver()
    try:
        yield saver
        with _failures_told():
            saver.wait()
    finally:
        saver.close()


def _check_targets(config: TrainConfig, model: nn.Module) -> None:
    """Raise ValueError for what the trained model could not be compressed to, or asked about."""
    try:
        prunable = Prunable.of(model, config.patterns)
    except ValueError as error:
        raise ValueError(f"--prunable: {error}.") from None
    for target in config.one_shot_targets:
        try:
            prunable.check(target)
        except ValueError as error:
            raise ValueError(f"--one-shot: {error}.") from None


def _take_folder(config: TrainConfig, world: World, held: ExitStack) -> Lock | None:
    """Make the folder of results, lock it on rank 0, and see that every rank sees the same one."""
    out = config.out_dir

    def take() -> Lock:
        try:
            out.mkdir(parents=True, exist_ok=True)
            return held.enter_context(hold(out, takes_over=config.take_over))
        except OSError as error:
            raise ValueError(
                f"--out {out} cannot be made or written to ({error.strerror}); give a folder where "
                "you may write."
            ) from None

    lock = world.together(lambda: take() if world.is_main else None)
    owner = world.on_main(lambda: lock and lock.owner)

    def see() -> None:
        deadline = time.monotonic() + _SHARED_FOLDER_S
        while holder(out) != owner:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"--out {out} is not one folder for all nodes: what rank 0 writes there does "
                    f"not reach rank {world.rank}; give a folder on a shared file system."
                )
            time.sleep(0.1)

    world.together(see)
    return lock


def _load_corpus(config: TrainConfig) -> Corpus:
    tokenizer = config.tokenizer
    if tokenizer is None and config.data == "stdlib":
        tokenizer = "byte"
    return load_corpus(config.data, tokenizer)


def _make_batches(config: TrainConfig, world: World, corpus: Corpus) -> Batches:
    # Called for its checks: validation must not fail after hours of training.
    eval_batches(corpus.val, config.batch_size, config.seq_len, config.eval_batches)
    return Batches(
        corpus.train,
        config.batch_size,
        config.seq_len,
        config.seed,
        world.rank,
        world.size,
        config.grad_accum,
    )


def _fingerprint(
    config: TrainConfig, size: GPTConfig, corpus: Corpus, data: dict[str, Any], world: World
) -> dict[str, Any]:
    """All that changes a run's numbers."""
    place = {"backend": world.backend, "device": world.device.type, "ranks": world.size}
    if config.wire is not None and config.wire.reduce != "flat":
        place["ranks_per_node"] = config.wire.ranks_per_node or int(
            os.environ.get("LOCAL_WORLD_SIZE", "1")
        )
    tokenizer, settings = corpus.tokenizer, config.identity | place
    schedule = settings.pop("schedule", None)
    return {
        "model": asdict(size),
        "tokenizer": hash_of("" if tokenizer is None else tokenizer.to_json()),
        "optimizer": config.method,
        "seed": config.seed,
        "data": data,
        "settings": settings,
    } | ({} if schedule is None else {"schedule": schedule})


def _announce(
    job: Job, source: Path | None, meta: dict[str, Any] | None, removed: list[str]
) -> None:
    config, world = job.config, job.world
    num_parameters = sum(p.numel() for p in job.model.parameters())
    batch_tokens = world.size * config.batch_size * config.grad_accum * config.seq_len
    job.say(
        f"{config.model}: {num_parameters:,} parameters on {world.size} "
        f"{'rank' if world.size == 1 else 'ranks'} ({world.backend}, {config.precision}), "
        f"{_travels(config)}, {config.method}{'+' * (config.cram and config.cram_plus)}, "
        f"{batch_tokens:,} tokens a step of {len(job.corpus.train):,}, results in {job.out}"
    )
    handle = job.handle
    for remark in [native.remark(world.device)] if handle is None else handle.report().remarks:
        job.say(f"  {remark}")
    if removed:
        job.say(f"  removed, of attempts that ended before: {', '.join(removed)}")
    if job.results.is_beside:
        job.say(
            f"  the other checkpoints in {job.out}, and what belongs to them, stay until this run "
            "has one"
        )
    if meta is None:
        return
    unheard = ("out", "resume", "keep", "save_async", "take_over")
    changes = [
        " ".join(f"{name} {was} -> {now}".split())
        for name, (was, now) in changed(config, meta).items()
        if name not in unheard
    ]
    if meta.get("world_size") != world.size:
        changes.append(f"ranks {meta.get('world_size')} -> {world.size}")
    noted = f" with other settings than before: {', '.join(changes)}" if changes else ""
    job.say(f"Going on from {source}, {job.steps_done} of {config.steps} steps done{noted}")


def _travels(config: TrainConfig) -> str:
    """How weights and gradients travel, in a few words."""
    wire = config.wire
    if wire is None:
        parts = ["stock FSDP2"]
    else:
        parts = [f"{wire.weight_bits}-bit weights", f"{wire.grad_bits}-bit gradients"]
        parts += [f"then {wire.budget:g} bits on average"] if wire.budget is not None else []
        parts += ["learned levels"] if wire.levels == "learned" else []
        parts += ["gathered once"] if wire.gather == "once" else []
    parts += [f"{config.replicas} replicas"] if config.replicas > 1 else []
    return ", ".join(parts)
