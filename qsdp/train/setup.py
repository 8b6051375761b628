"""Everything before the first step: data, model, optimizer, and the checkpoint to go on from."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qsdp
from qsdp import checkpoint
from qsdp.codec import native
from qsdp.data import Batches, Corpus, eval_batches, load_corpus
from qsdp.data.tokenizer import hash_of
from qsdp.files import claimed_folder, remove_tree, unclaimed
from qsdp.metrics import MetricsWriter
from qsdp.models import GPT, GPTConfig
from qsdp.optim.base import OptimizerWrapper
from qsdp.sparsity.compression import Prunable
from qsdp.train.agree import agree_on_config, agree_on_data, data_facts
from qsdp.train.config import TrainConfig
from qsdp.train.errors import UserError, is_lost
from qsdp.train.evaluate import Evaluator
from qsdp.train.parallelize import build, check_nodes, check_replicas, make_optimizer, model_config
from qsdp.train.results import CHECKPOINTS, METRICS, Results, restore
from qsdp.train.resume import changed, find_checkpoint, is_finished, pace_since
from qsdp.train.wire import QuantizedWire, StockWire, Wire
from qsdp.train.world import World

# What every line of metrics.jsonl has; a validation adds more.
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
    origin: str | None
    """The identity of the checkpoint that --resume PATH named, if this came of one."""
    results: Results
    steps_done: int
    pace_since: int
    """The step after which batch, wire, precision, optimizer and world have been as they are now:
    times and bytes of earlier steps are another run's."""
    why_no_twin: str = "the run went on from a checkpoint after the last dense phase"
    """Of AC/DC, as long as nothing was kept."""
    metrics: MetricsWriter | None = None
    """On rank 0, once it is open."""
    has_checkpoint: bool = False
    """Whether this process has written one."""

    @property
    def out(self) -> Path:
        return self.config.out_dir

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.world.is_main:
            print(text, flush=True)

    @property
    def has_mistake(self) -> bool:
        """Whether this rank has something to say in `check`."""
        has_lost_lines = self.metrics is not None and self.metrics.mistake is not None
        return has_lost_lines or self.corpus.mistake() is not None

    def check(self) -> None:
        """Raise ValueError for tokens that cannot be, OSError for lines that were not written."""
        self.corpus.check()
        if self.metrics is not None:
            self.metrics.check()

    def open_metrics(self) -> None:
        """Open the metrics file, on rank 0. Raises UserError everywhere if it cannot be written."""
        folder = self.out / "tensorboard" if self.config.tensorboard else None
        source = self.out / METRICS if self.results.has_lines else None
        self.metrics = self.world.together(
            lambda: (
                MetricsWriter(self.results.metrics, self.steps_done, folder, STEP_METRICS, source)
                if self.world.is_main
                else None
            )
        )

    def save(self) -> None:
        """Write the checkpoint of the steps done."""
        # Whoever finds the checkpoint finds the lines of its steps.
        self.world.on_main(lambda: None if self.metrics is None else self.metrics.sync())
        self.keep(CHECKPOINTS, self.steps_done, self.optimizer, {}, self.config.keep)
        if not self.has_checkpoint:
            self.has_checkpoint = True
            self._say_removed(self.world.on_main(self._settle))
            self.results.outdated.clear()

    def keep(
        self,
        folder: str,
        steps_done: int,
        optimizer: torch.optim.Optimizer | None,
        more: dict[str, Any],
        number: int,
    ) -> None:
        """Write a checkpoint into `folder` of the results, with `more` beside what all of them
        have; the newest `number` stay."""
        tokenizer, results = self.corpus.tokenizer, self.results
        is_outdated = folder in results.outdated
        try:
            if is_outdated:
                self.world.on_main(lambda: results.set_aside(folder))
            checkpoint.save(
                self.out / folder,
                steps_done,
                self.model,
                optimizer,
                {
                    "fingerprint": self.fingerprint,
                    "config": self.config.as_dict(),
                    "wire": None if self.handle is None else self.handle.state_dict(),
                    "world_size": self.world.size,
                    "pace_since": self.pace_since,
                    "history": results.history,
                    "origin": self.origin,
                    **more,
                },
                files={} if tokenizer is None else {"tokenizer.json": tokenizer.to_json()},
                keep=number,
            )
        except (RuntimeError, UserError) as error:
            if is_outdated and not is_lost(error):
                self.world.on_main(lambda: restore(self.out))
            raise
        if is_outdated:
            results.outdated.remove(folder)
            self._say_removed(self.world.on_main(lambda: results.remove_aside(folder)))

    def _settle(self) -> list[str]:
        removed = self.results.settle()
        if self.metrics is not None and self.results.replaces:
            self.metrics.rename(self.out / METRICS)
        return removed

    def _say_removed(self, names: list[str]) -> None:
        if names:
            self.say(f"Removed from {self.out}, as outdated now: {', '.join(names)}")


def set_up(config: TrainConfig, world: World) -> Job | None:
    """Build the job of `config` on all ranks; None if it is finished already, which is said.

    Raises UserError, on every rank, for whatever the user can correct.
    """
    agree_on_config(config, world)
    _make_shared_folder(config.out_dir, world)
    world.together(lambda: check_replicas(config, world))
    world.together(lambda: check_nodes(config, world))
    corpus = world.together(lambda: _load_corpus(config))
    agree_on_data(corpus, world)
    size = world.together(lambda: model_config(config, corpus.vocab_size))
    batches = world.together(lambda: _make_batches(config, world, corpus))
    fingerprint = _fingerprint(config, size, corpus, world)
    world.on_main(lambda: restore(config.out_dir))
    found = world.on_main(lambda: find_checkpoint(config, fingerprint))
    source, meta = found if found is not None else (None, None)
    if meta is not None and config.resume == "auto" and is_finished(config, meta):
        if world.is_main:
            print(
                f"{config.out_dir} holds this run, finished after {meta['step']} steps: nothing to "
                f"train. To go on, give more --steps and --resume {config.out_dir}; to train "
                "again, another --out, or --resume none."
            )
        return None

    sharded = world.together(lambda: build(config, size, world))
    model, handle = sharded.model, sharded.handle
    wire = StockWire(model, world, config.replicas) if handle is None else QuantizedWire(handle)
    world.together(lambda: _check_targets(config, model))
    optimizer = world.together(lambda: make_optimizer(config, model))
    if handle is not None and isinstance(optimizer, OptimizerWrapper):
        optimizer.share_support(handle.set_support)
    steps_done = 0
    if source is not None and meta is not None:
        all_alike(world, lambda: checkpoint.load(source, model, optimizer))
        steps_done = meta["step"]
        if handle is not None and meta["wire"] is not None:
            load, state = handle.load_state_dict, meta["wire"]
            all_alike(world, lambda: load(state))
    origin, results = world.on_main(lambda: _results(config, source, meta))
    before = None if meta is None else meta["history"]
    removed, results.outdated = world.on_main(lambda: results.begin(before))
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
        fingerprint=fingerprint,
        origin=origin,
        results=results,
        steps_done=steps_done,
        pace_since=0 if meta is None else pace_since(config, world, meta),
    )
    _announce(job, source, meta, removed)
    return job


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


def all_alike(world: World, collective: Callable[[], None]) -> None:
    """Run what communicates and fails on all ranks alike, or on none."""
    mistake = None
    try:
        collective()
    except (ValueError, RuntimeError) as error:
        mistake = error

    def report() -> None:
        if mistake is not None:
            raise mistake

    world.together(report)


def _make_shared_folder(out: Path, world: World) -> None:
    """Make the folder of results and see that every rank sees the same one."""
    probe = out / f".probe-{world.on_main(time.time_ns)}"
    claim = contextlib.ExitStack()

    def make() -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for path in filter(Path.is_dir, out.glob(".probe-*")):
                with unclaimed(path) as is_free:
                    if is_free:  # a killed run's
                        remove_tree(path)
            claim.enter_context(claimed_folder(probe))
        except OSError as error:
            raise ValueError(
                f"--out {out} cannot be made or written to ({error.strerror}); give a folder where "
                "you may write."
            ) from None

    def see() -> None:
        deadline = time.monotonic() + _SHARED_FOLDER_S
        while not probe.exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"--out {out} is not one folder for all nodes: what rank 0 writes there does "
                    f"not reach rank {world.rank}; give a folder on a shared file system."
                )
            time.sleep(0.1)

    with claim:
        world.on_main(make)
        world.together(see)


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
    config: TrainConfig, size: GPTConfig, corpus: Corpus, world: World
) -> dict[str, Any]:
    """All that changes a run's numbers."""
    tokenizer = corpus.tokenizer
    schedule = config.mask_schedule(config.steps)
    return {
        "model": asdict(size),
        "tokenizer": hash_of("" if tokenizer is None else tokenizer.to_json()),
        "optimizer": config.method,
        "seed": config.seed,
        "data": data_facts(corpus),
        "settings": config.identity | {"backend": world.backend, "ranks": world.size},
    } | ({} if schedule is None else {"schedule": asdict(schedule)})


def _results(
    config: TrainConfig, source: Path | None, meta: dict[str, Any] | None
) -> tuple[str | None, Results]:
    """Where the history of this run began, if that was another run's checkpoint, and its folder."""
    root = config.out_dir / CHECKPOINTS
    newest = checkpoint.latest(root)
    is_newest = source is not None and newest is not None and source.samefile(newest)
    origin = None
    if source is not None and meta is not None:
        origin = meta["origin"] if is_newest else checkpoint.identity(source)
    return origin, Results(
        out=config.out_dir,
        config=config.to_toml(),
        history=meta["history"] if meta is not None and is_newest else secrets.token_hex(4),
        began_at=0 if meta is None else meta["step"],
        replaces=newest is not None and not is_newest,
        has_lines=source is not None and root.exists() and source.parent.samefile(root),
    )


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
        job.say(f"  removed, of an attempt that had no checkpoint: {', '.join(removed)}")
    if job.results.replaces:
        job.say(
            f"  the other checkpoints in {job.out}, and what belongs to them, stay until this run "
            "has one"
        )
    if meta is None:
        return
    before, after = meta["config"], config.as_dict()
    changes = [
        f"{name} {before.get(name, 'unset')} -> {after.get(name, 'unset')}"
        for name in changed(config, meta)
        if name not in ("out", "resume", "keep")
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
