"""The training loop: steps, validations, checkpoints, and the summary at the end."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from qsdp.common.collective_errors import collective
from qsdp.common.gpu_streams import to_device
from qsdp.common.meshes import groups_of
from qsdp.common.printing import forgiving_output
from qsdp.compat.sharded_parameters import sharded_parameters
from qsdp.methods.clip_grad import scale_grads_
from qsdp.methods.grad_norm import global_grad_norm
from qsdp.methods.nonfinite import name_not_finite
from qsdp.methods.optimizer_wrapper import OptimizerWrapper
from qsdp.report.progress import RunProgress
from qsdp.train.after_training import finish
from qsdp.train.config import TrainConfig
from qsdp.train.job import Job
from qsdp.train.setup import set_up
from qsdp.train.signals import StopRequested, handling_signals
from qsdp.train.wire_bytes import SECONDS, WireUse, threshold_bytes
from qsdp.train.world import open_world

# Of the wire, what a line of metrics.jsonl says beside the sums.
WIRE_METRICS = (
    *("gather_bytes", "reduce_bytes", "gather_inter_node_bytes", "reduce_inter_node_bytes"),
    *SECONDS,
)
CHANGE_METRICS = ("changed_codes", "redrawn_buckets")
"""And where changes of weights are gathered."""
_NO_STEP = "no step was taken; the same command begins again"


def training_loop(config: TrainConfig) -> None:
    """The training loop: run the job of ``config`` from where it was left to its summary.

    Called on every rank, under torchrun or alone. Told to end by a signal (``train/signals.py``),
    it saves the steps done and returns. Raises UserError, on every rank, for whatever the user can
    correct.
    """
    with (
        forgiving_output(),
        ExitStack() as handling,
        open_world(config.run.timeout_s, config.run.backend) as world,
        ExitStack() as held,
    ):
        # Only now: a rank that waits for others in C++ would not heed a signal.
        stop = handling.enter_context(handling_signals(world.stop))
        try:
            job = set_up(config, world, held)
        except StopRequested:
            if world.is_main:
                print(f"{stop.why}: {_NO_STEP}", flush=True)
            return
        if job is None:
            return
        config = job.config  # what --qsdp-bits auto has come to
        job.open_metrics()
        metrics = job.metrics
        progress = RunProgress(job.steps_done, config.run.steps, is_shown=world.is_main)
        companion = config.method.companion(job)
        saved, is_save_due = job.steps_done, False
        with metrics or nullcontext(), progress:
            while job.steps_done < config.run.steps and not stop.is_agreed:
                step = job.steps_done + 1
                is_validated = _is_due(config.output.eval_every, step, config, at_end=False)
                # ``finish`` validates after the last step.
                is_measured = config.wire.qsdp_errors and (is_validated or step == config.run.steps)
                line = train_step(job, is_measured=is_measured)
                if is_validated and not job.has_failed:
                    if stop.is_agreed:  # there may be no time for the validation
                        if metrics is not None:
                            metrics.log(line)
                        job.save()
                        job.wait_saved()
                        saved = step
                    validate_in_loop(job, progress, line)
                    companion.after_validation(step, line["val_loss"])
                if is_measured and job.handle is not None:
                    line["wire_errors"] = job.handle.errors()
                if metrics is not None:
                    metrics.log(line)
                progress.show(line)
                if job.bad_in_row == 1:
                    progress.note(f"step {step} is skipped, not finite is {job.last_bad}")
                job.check_bad_steps()
                is_save_due |= _is_due(config.output.save_every, step, config, at_end=True)
                # What may be the last good checkpoint is not rotated out meanwhile.
                is_put_off = job.bad_in_row and step < config.run.steps
                if saved < step and (stop.is_agreed or (is_save_due and not is_put_off)):
                    job.save()
                    saved, is_save_due = step, False
            is_new = job.results.is_beside and not job.has_checkpoint
            if is_new and job.steps_done == config.run.steps:  # no step was left to take
                job.save()
            job.wait_saved()
            job.settle()
        if stop.is_agreed or not finish(job, companion, [] if metrics is None else metrics.history):
            job.say(_stopped(job))


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate in the loop, of step number ``step`` from 0 on: linear warm-up, then a cosine.

    The cosine ends in ``last_lr`` at the last step, or at the last one of each cycle that the
    method has; a warm-up as long as the run has none.
    """
    if step < config.run.warmup_steps:
        return config.run.lr * (step + 1) / config.run.warmup_steps
    begin, end = config.run.warmup_steps, config.run.steps
    cycle = config.method.learning_rate_cycle(step, config.run.steps)
    if cycle is not None:
        place, length = cycle
        begin, end = max(begin, step - place), step - place + length
    done = min(1.0, (step - begin) / max(1, end - 1 - begin))
    share = (1 + math.cos(math.pi * done)) / 2
    return share * config.run.lr + (1 - share) * config.run.last_lr


def train_step(job: Job, *, is_measured: bool = False) -> dict[str, Any]:
    """Take one optimizer step and return its metrics.

    All ranks skip it where a loss or a gradient of any of them is not finite. Bytes, and the
    seconds of the wire's parts, are means over ranks. ``is_measured``: the handle measures the
    errors of the gradients that it reduces.
    """
    config, world, optimizer = job.config, job.world, job.optimizer
    lr = learning_rate(config, job.steps_done)
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = job.wire.total()
    started = time.perf_counter()
    with job.handle.measuring() if is_measured and job.handle is not None else nullcontext():
        if isinstance(optimizer, OptimizerWrapper):
            optimizer.zero_grad()
            loss = optimizer.step(lambda: run_micro_batches(job))
            grad_norm, bad = optimizer.last_grad_norm or 0.0, optimizer.last_bad
            if optimizer.last_target is not None:
                num_matrices = len(optimizer.prunable.names)
                num_shards = world.size // config.run.replicas
                job.wire.other(threshold_bytes(optimizer.last_target, num_matrices, num_shards))
        else:
            optimizer.zero_grad()
            loss = run_micro_batches(job)
            grad_norm, bad = _clip(job, loss)
            if bad is None:
                optimizer.step()
    job.count_step(bad)
    used = asdict(job.wire.total() - before)
    # The sum waits for the device, so the time that follows is the whole step's.
    *sums, mistakes = world.sum(loss, *used.values(), job.has_mistake)
    if mistakes:
        world.together(job.check)
    loss_mean, *means = (total / world.size for total in sums)
    step_s = time.perf_counter() - started
    wire = WireUse(**dict(zip(used, means, strict=True)))
    pruned = {}
    if isinstance(optimizer, OptimizerWrapper):
        pruned = {"pruned": optimizer.pruned}
    step_tokens = world.size * config.run.grad_accum * config.run.batch_size * config.run.seq_len
    return {
        "step": job.steps_done,
        "loss": loss_mean,
        "lr": lr,
        "grad_norm": grad_norm,
        "skipped_steps": job.skipped_steps,
        "tokens_per_s": step_tokens / step_s,
        "step_s": step_s,
        "tokens": job.steps_done * step_tokens,
        "wire_bytes_sent": wire.sent_bytes,
        "wire_bytes_other": wire.other_bytes,
        "wire_bytes_fp32": wire.fp32_bytes,
        **{name: _none_if_unknown(getattr(wire, name)) for name in WIRE_METRICS},
        **{name: getattr(wire, name) for name in CHANGE_METRICS if _gathers_changes(job)},
        **pruned,
    }


def run_micro_batches(job: Job) -> Tensor:
    """Run all micro-batches of the step, leave the mean gradient, return this rank's mean loss."""
    config, device = job.config, job.world.device
    total = torch.zeros((), device=device)
    for micro in range(config.run.grad_accum):
        cast(FSDPModule, job.model).set_requires_gradient_sync(micro == config.run.grad_accum - 1)
        inputs_BT, targets_BT = job.batches.get(job.steps_done, micro)
        _, loss = job.model(to_device(inputs_BT, device), to_device(targets_BT, device))
        (loss / config.run.grad_accum).backward()
        total += loss.detach() / config.run.grad_accum
    job.wire.reduced()
    return total


def validate_in_loop(job: Job, progress: RunProgress, line: dict[str, Any]) -> None:
    """Validate within the loop: with exact weights, and with those off a quantized wire.

    What is found goes into the step's ``line``. So do bytes of changes that the next step would
    have sent: the first gather in a step sends them, whatever it is for.
    """
    before = job.wire.total()
    losses = {"val_loss": job.evaluator.loss()}
    text = f"step {job.steps_done}: validation loss {losses['val_loss']:.4f}"
    if job.handle is not None:
        job.handle.state_dict()  # bits and levels are those of a checkpoint, saved before or after
        losses["val_loss_quantized"] = job.evaluator.loss(exact=False)
        text += f", with quantized weights {losses['val_loss_quantized']:.4f}"
    progress.note(text)
    spent = job.wire.total() - before
    line |= losses | {"eval_bytes_sent": spent.other_bytes}
    if _gathers_changes(job):
        names = ("gather_bytes", "gather_inter_node_bytes", *CHANGE_METRICS)
        early = job.world.sum(*(getattr(spent, name) for name in names))
        for name, total in zip(names, early, strict=True):
            line[name] += total / job.world.size
        line["wire_bytes_sent"] = line["gather_bytes"] + line["reduce_bytes"]


def _gathers_changes(job: Job) -> bool:
    return job.handle is not None and job.handle.config.gather == "delta"


def _stopped(job: Job) -> str:
    """What a run says that a signal has ended."""
    done, steps = job.steps_done, job.config.run.steps
    if not done:  # OUT may hold another run, which --resume auto would go on with
        return f"{job.world.stop.why}: {_NO_STEP}"
    saved = f"step {done} of {steps} is saved"
    what = "ends the run with its last evaluation" if done == steps else "goes on from there"
    return f"{job.world.stop.why}: {saved}; {job.same_command} {what}"


def _clip(job: Job, loss: Tensor) -> tuple[float, str | None]:
    """Clip the gradients. Returns their norm, and what is not finite of them and the loss."""
    parameters = list(job.model.parameters())
    with collective("sum of the gradients' norm"):
        norm = global_grad_norm(parameters, loss=loss)
    if not math.isfinite(norm):
        groups = groups_of(parameters, with_replicas=True)
        return norm, name_not_finite(sharded_parameters(job.model), loss, groups)
    if job.config.run.clip_grad:
        scale_grads_(parameters, job.config.run.clip_grad, norm)
    return norm, None


def _none_if_unknown(value: float) -> float | None:
    return None if math.isnan(value) else value


def _is_due(every: int, step: int, config: TrainConfig, *, at_end: bool) -> bool:
    is_end = step == config.run.steps
    return (at_end if is_end else bool(every)) and (is_end or step % every == 0)
