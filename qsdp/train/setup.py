"""Everything before the first step: data, model, optimizer, and the checkpoint to go on from."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from qsdp import checkpoint
from qsdp.common.printing import print_error
from qsdp.common.user_errors import counted, quoted
from qsdp.data.batches import Batches, eval_batches
from qsdp.data.corpus import Corpus
from qsdp.data.tokenizer import hash_of
from qsdp.methods.optimizer_wrapper import OptimizerWrapper
from qsdp.models.registry import family_of
from qsdp.models.size import ModelSize
from qsdp.ops import native
from qsdp.sparsity.prunable import Prunable
from qsdp.train.agree_on_inputs import agree_on_config, agree_on_data, read_corpus
from qsdp.train.auto.choose import Choice, choose
from qsdp.train.config import TrainConfig
from qsdp.train.history import HistoryFolder, HistoryStart, recover
from qsdp.train.job import Job, _failures_told
from qsdp.train.lock import Lock, hold, holder
from qsdp.train.make_optimizer import make_optimizer
from qsdp.train.parallelize import check_nodes, check_replicas, parallelize
from qsdp.train.resume import (
    changed,
    find_whole_start,
    is_finished,
    pace_since,
    told_as_damaged,
)
from qsdp.train.resumed_grids import take_grids
from qsdp.train.validate import Evaluator
from qsdp.train.wire_bytes import QuantizedWire, StockWire
from qsdp.train.wire_flags import AUTO
from qsdp.train.world import World

_SHARED_FOLDER_S = 10.0  # how long a network file system may take to show a new file


def set_up(config: TrainConfig, world: World, held: ExitStack) -> Job | None:
    """Build the job of ``config`` on all ranks; None if it is finished already, which is said.

    The folder of results is this run's until ``held`` is closed.

    Raises:
        UserError: On every rank, for whatever the user can correct.
        StopRequested: As ``choose``.
        CollectiveError: As ``choose``.
    """
    agree_on_config(config, world)
    lock = _take_folder(config, world, held)
    world.together(lambda: check_replicas(config, world))
    world.together(lambda: check_nodes(config, world))
    corpus = world.together(lambda: read_corpus(config.data, config.data.chosen_tokenizer, world))
    data = agree_on_data(corpus, world)
    size = world.together(lambda: _model_size(config, corpus.vocab_size))
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
            print_error(f"warning: {line}.")
    if meta is not None and config.output.resume == "auto" and is_finished(config, meta):
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
    sharded = world.together(lambda: parallelize(config, size, world))
    model, handle = sharded.model, sharded.handle
    wire = StockWire(model, world, config.run.replicas) if handle is None else QuantizedWire(handle)
    world.together(lambda: _check_targets(config, model))
    optimizer = world.together(lambda: make_optimizer(config, model))
    if handle is not None and isinstance(optimizer, OptimizerWrapper):
        optimizer.share_support(handle.set_support)
    steps_done, why_anew = 0, None
    if source is not None and meta is not None:
        world.all_alike(lambda: checkpoint.load(source, model, optimizer, is_checked=True))
        steps_done = meta["step"]
        if handle is not None and meta["wire"] is not None:
            load, state = handle.load_state_dict, meta["wire"]
            world.all_alike(lambda: load(state))
        if handle is not None:
            why_anew = take_grids(handle, source, meta, world)
    comment = "" if choice is None else choice.comment
    results = HistoryFolder(config.out_dir, comment + config.to_toml(), start)
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
        saver=held.enter_context(_saving_beside()) if config.output.save_async else None,
        choice=choice,
        steps_done=steps_done,
        skipped_steps=0 if meta is None else meta["skipped_steps"],
        bad_in_row=0 if meta is None else meta["bad_in_row"],
        pace_since=0 if meta is None else pace_since(config, world, meta),
    )
    _announce(job, source, meta, removed, why_anew)
    return job


def _settle_wire(
    config: TrainConfig, size: ModelSize, world: World, start: HistoryStart
) -> tuple[TrainConfig, Choice | None]:
    """The configuration with what --qsdp-bits auto comes to, and that choice.

    A run that goes on keeps the one that it has made, whatever the link is like by now.
    """
    meta = start.meta
    kept = None if meta is None or meta["choice"] is None else Choice(**meta["choice"])
    if kept is not None and kept.measured is None and world.size > 1:
        kept = None  # one rank had nothing to choose
    if config.wire.qsdp_bits != AUTO:
        # Its flags, given by hand, go on with the same run.
        is_same = meta is not None and meta["history"] == start.history
        return config, kept if is_same else None
    choice = kept or choose(config, size, world)
    if world.is_main:
        again = " (as chosen when the run began)" * (kept is not None)
        print(f"{choice.line}{again}", flush=True)
    return config.resolved(choice.settings), choice


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
        prunable = Prunable.of(model, config.compression.patterns)
    except ValueError as error:
        raise ValueError(f"--prunable: {quoted(error)}.") from None
    for target in config.compression.targets:
        try:
            prunable.check(target)
        except ValueError as error:
            raise ValueError(f"--one-shot: {quoted(error)}.") from None


def _take_folder(config: TrainConfig, world: World, held: ExitStack) -> Lock | None:
    """Make the folder of results, lock it on rank 0, and see that every rank sees the same one."""
    out = config.out_dir

    def take() -> Lock:
        try:
            out.mkdir(parents=True, exist_ok=True)
            return held.enter_context(hold(out, takes_over=config.output.take_over))
        except OSError as error:
            raise ValueError(
                f"--out {out} cannot be made or written to ({error.strerror}): give a folder where "
                "you may write."
            ) from None

    lock = world.together(lambda: take() if world.is_main else None)
    owner = world.on_main(lambda: lock and lock.owner)

    def see() -> None:
        deadline = time.monotonic() + _SHARED_FOLDER_S
        while holder(out) != owner:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"--out {out} is not one folder for all nodes, as what rank 0 writes there "
                    f"does not reach rank {world.rank}: give a folder on a shared file system."
                )
            time.sleep(0.1)

    world.together(see)
    return lock


def _make_batches(config: TrainConfig, world: World, corpus: Corpus) -> Batches:
    # Called for its checks: validation must not fail after hours of training.
    eval_batches(corpus.val, config.run.batch_size, config.run.seq_len, config.output.eval_batches)
    return Batches(
        corpus.train,
        config.run.batch_size,
        config.run.seq_len,
        config.run.seed,
        world.rank,
        world.size,
        config.run.grad_accum,
    )


def _fingerprint(
    config: TrainConfig, size: ModelSize, corpus: Corpus, data: dict[str, Any], world: World
) -> dict[str, Any]:
    """All that changes a run's numbers."""
    place = {"backend": world.backend, "device": world.device.type, "ranks": world.size}
    if config.qsdp is not None and config.qsdp.reduce != "flat":
        place["ranks_per_node"] = config.qsdp.ranks_per_node or int(
            os.environ.get("LOCAL_WORLD_SIZE", "1")
        )
    tokenizer, settings = corpus.tokenizer, config.identity | place
    schedule = settings.pop("schedule", None)
    return {
        "model": asdict(size),
        "tokenizer": hash_of("" if tokenizer is None else tokenizer.to_json()),
        "optimizer": config.method.NAME,
        "seed": config.run.seed,
        "data": data,
        "settings": settings,
    } | ({} if schedule is None else {"schedule": schedule})


def _announce(
    job: Job,
    source: Path | None,
    meta: dict[str, Any] | None,
    removed: list[str],
    why_anew: str | None,
) -> None:
    config, world = job.config, job.world
    num_parameters = sum(p.numel() for p in job.model.parameters())
    batch_tokens = world.size * config.run.batch_size * config.run.grad_accum * config.run.seq_len
    job.say(
        f"{config.run.model}: {num_parameters:,} parameters on "
        f"{counted(world.size, 'rank')} ({world.backend}, {config.run.precision}), "
        f"{_travels(config)}, {config.method.title}, "
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
    job.say(f"Going on from {source}, {job.steps_done} of {config.run.steps} steps done{noted}")
    if why_anew is not None:
        job.say(f"  all grids of the weights are drawn anew, as {why_anew}")


def _travels(config: TrainConfig) -> str:
    """What the set-up prints of how weights and gradients travel."""
    wire = config.qsdp
    if wire is None:
        parts = ["stock FSDP2"]
    else:
        parts = [f"{wire.weight_bits}-bit weights", f"{wire.grad_bits}-bit gradients"]
        budget, whose = wire.budget_of(is_grad=True), " of gradients" * (wire.budget is None)
        parts += [f"then {budget:g} bits{whose} on average"] if budget is not None else []
        parts += ["learned levels"] if wire.levels == "learned" else []
        how = {"once": "gathered once", "delta": "gathered as changes"}
        parts += [how[wire.gather]] if wire.gather in how else []
    parts += [f"{config.run.replicas} replicas"] if config.run.replicas > 1 else []
    return ", ".join(parts)


def _model_size(config: TrainConfig, vocab_size: int) -> ModelSize:
    """The model's size: the preset with the data's vocabulary.

    Raises ValueError for sequences longer than the preset's context.
    """
    size = family_of(config.run.model).size_of_preset(config.run.model, vocab_size)
    if config.run.seq_len > size.context:
        raise ValueError(
            f"--seq-len is {config.run.seq_len}, but {config.run.model} has a context of "
            f"{size.context}: choose at most that."
        )
    return size
