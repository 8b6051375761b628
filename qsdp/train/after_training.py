"""The end of a run: last evaluation, summary.json, plots, and tables on the terminal."""

from __future__ import annotations

import math
import platform
import statistics
from dataclasses import asdict

import torch
from rich.console import Console

import qsdp
from qsdp.common.json_files import json_value, write_json
from qsdp.common.user_errors import UserError
from qsdp.methods.method import Companion
from qsdp.models.registry import family_of_size
from qsdp.ops import native
from qsdp.report.peak_flops import matmul_flops_per_s
from qsdp.report.plots import may_fail, remove_stale, write_plots
from qsdp.report.step_line import History, step_metrics
from qsdp.report.summary_json import Summary
from qsdp.report.summary_tables import print_summary
from qsdp.train.history import CHECKPOINTS
from qsdp.train.job import Job
from qsdp.train.wire_bytes import SECONDS


def finish(job: Job, companion: Companion, history: History) -> bool:
    """Evaluate, then write and print what the run came to; called on all ranks alike.

    ``history`` holds the metrics of all steps, on rank 0. Returns whether it came to that: not if
    the ranks agree meanwhile that the run is to end.
    """
    before = job.wire.total()
    val_loss = job.evaluator.loss()
    has_another = job.handle is not None and not job.world.stop.is_agreed
    quantized = job.evaluator.loss(exact=False) if has_another else None
    one_shot = job.evaluator.one_shot()
    if job.world.stop.is_agreed:
        return False
    companion.after_validation(job.steps_done, val_loss)
    sparsity = job.evaluator.sparsity()
    outcome = companion.outcome()
    sample = job.evaluator.sample()
    last_other = job.world.sum((job.wire.total() - before).other_bytes)[0] / job.world.size
    peak = job.world.sum(matmul_flops_per_s(job.world.device, job.config.run.precision))[0]
    # A run may go on with another batch, another wire or other ranks, whose steps do not compare.
    alike = [line for line in history if line["step"] > job.pace_since]
    steps = max(1, len(alike))
    step_s = _median(alike, "step_s")
    config = job.config
    tokens_per_s = _median(alike, "tokens_per_s")
    size = job.model.config
    flops_per_token = family_of_size(size).flops_per_token(size, config.run.seq_len)
    flops_per_s = config.method.PASSES * flops_per_token * (tokens_per_s or 0)
    all_of_it = {
        "val_loss": val_loss,
        "val_loss_quantized": quantized,
        **outcome.results,
        "one_shot": one_shot,
        "method": config.method.NAME,
        "sparsity": sparsity,
        "steps": job.steps_done,
        # Of these, those whose loss or gradient was not finite.
        "skipped_steps": job.skipped_steps,
        # As the checkpoints of the run have it: another run in the same folder has another.
        "history": job.results.start.history,
        # The steps that the times and bytes below are of.
        "steps_measured": len(alike),
        "step_s_median": step_s,
        "tokens_per_s": tokens_per_s,
        "mfu": flops_per_s / peak if tokens_per_s and math.isfinite(peak) else None,
        "mfu_peak_flops_per_s": peak,
        "mfu_peak_source": "a square matmul in the run's precision, timed on all ranks at once",
        "wire": {
            "sent_bytes_per_step": _mean(alike, "wire_bytes_sent"),
            "other_bytes_per_step": _mean(alike, "wire_bytes_other")
            + _mean(alike, "eval_bytes_sent", steps)
            + last_other / steps,
            "fp32_bytes_per_step": _mean(alike, "wire_bytes_fp32"),
            "inter_node_bytes_per_step": {
                direction: _mean_or_none(alike, f"{direction}_inter_node_bytes")
                for direction in ("gather", "reduce")
            },
            "kept_bytes": 0 if job.handle is None else job.handle.kept_bytes,
            "seconds_per_step": {name: _mean_or_none(alike, name) for name in SECONDS},
            "source": "counted by qsdp"
            if job.handle is not None
            else f"computed from stock FSDP2's plan over {job.world.backend}",
        },
        # What --qsdp-bits auto measured and chose; the flags that say the same are in ``config``.
        "choice": None if job.choice is None else asdict(job.choice),
        "world_size": job.world.size,
        "kernels": native.serving(job.world.device),
        "sample": sample,
        "versions": {
            "qsdp": qsdp.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "config": config.as_dict(),
    }

    summary: Summary = json_value(all_of_it)

    def write() -> None:
        # First what needs no disk.
        print_summary(Console(), summary)
        if outcome.remark is not None:
            job.say(outcome.remark)
        job.check_lock()
        may_fail(f"the plots in {job.out / 'plots'}", draw)
        _write_summary(job, summary)
        print(f"Results are in {job.out}", flush=True)

    def draw() -> None:
        plots = write_plots(job.out / "plots", history, summary)
        if plots:
            print(f"Plots: {', '.join(str(path) for path in plots)}")
        else:
            print("No plots: matplotlib is not installed (pip install matplotlib).")
        if stale := remove_stale(job.out / "plots", plots):
            print(f"Removed, of an earlier state of the run: {', '.join(stale)}")

    # Nobody leaves before all is on disk: a launcher may end rank 0 when another rank is gone.
    job.world.on_main(write)
    return True


def _write_summary(job: Job, summary: Summary) -> None:
    path = job.out / "summary.json"
    try:
        write_json(path, summary)
    except OSError as error:
        raise UserError(
            f"the training is done, with its last checkpoint in {job.out / CHECKPOINTS}, but "
            f"{path} cannot be written ({error.strerror or error}): free some space there, and "
            f"{job.same_command} writes it."
        ) from None


def _mean(history: History, name: str, over: int = 0) -> float:
    """The mean of a metric over the steps that have it, or its sum over ``over`` steps."""
    values = step_metrics(history, name)
    return sum(values) / max(1, over or len(values))


def _mean_or_none(history: History, name: str) -> float | None:
    """The mean of a metric over the steps that have it; None if none has."""
    return _mean(history, name) if step_metrics(history, name) else None


def _median(history: History, name: str) -> float | None:
    """The median of a metric over the steps that have it; None if none has."""
    values = step_metrics(history, name)
    return statistics.median(values) if values else None
