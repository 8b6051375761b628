"""Saving and loading model and optimizer with torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from qsdp.checkpoint.folders import META, begin, publish


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: Mapping[str, Any],
    *,
    files: Mapping[str, str] | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` into `root`; a crash at any instant leaves it whole or absent.

    1. rank 0 makes a temporary folder;
    2. all ranks write their shards into it, exact fp32, and sync them to disk;
    3. rank 0 adds meta.json and `files`, syncs, renames the folder, and removes old checkpoints.

    Args:
        root: folder of the run's checkpoints, which every rank sees.
        step: optimizer steps done.
        model: whose parameters and buffers to save, sharded or not.
        optimizer: whose state to save; a wrapper around another optimizer gives that one.
        meta: JSON values to keep with it.
        files: texts to keep with it, by file name.
        keep: how many of the newest checkpoints stay.

    Returns: the checkpoint's folder.
    Raises: RuntimeError, on every rank, if any could not write.
    """
    _on_first(lambda: begin(root, step))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    try:
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=root / f"tmp-step-{step:08d}",
        )
    except CheckpointException as error:
        raise RuntimeError(
            f"the checkpoint of step {step} cannot be written to {root} ({_cause(error)}); free "
            "some space there, or choose another --out"
        ) from error
    texts = {**(files or {}), META: json.dumps({**meta, "step": step}, indent=1) + "\n"}
    _on_first(lambda: publish(root, step, texts, keep))
    return root / f"step-{step:08d}"


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint at `path` into `model` and `optimizer`, in place, on any number of ranks.

    Raises: ValueError, on every rank, if any part is missing, damaged or of another shape.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    try:
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:
        raise ValueError(
            f"{path} cannot be loaded ({_cause(error)}); resume from another checkpoint"
        ) from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def _on_first(work: Callable[[], object]) -> None:
    """Run `work` on rank 0; all wait for it and learn of its failure."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            failure[0] = f"{error.filename}: {error.strerror}"
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise RuntimeError(f"a checkpoint cannot be written ({failure[0]}); choose another --out")


def _cause(error: CheckpointException) -> str:
    """The first rank's failure, on one line."""
    first = next(iter(error.failures.values()))[0]
    return " ".join(f"{type(first).__name__}: {first}".split())[:300]
