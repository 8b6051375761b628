"""What a checkpoint holds of model and optimizer, and how torch.distributed.checkpoint loads it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from qsdp.checkpoint.folders import Damaged, verify
from qsdp.checkpoint.plain_values import Refused
from qsdp.checkpoint.safe_loading import Reader, ReadingPlanner
from qsdp.common.collective_errors import listed
from qsdp.common.rank_agreement import meet
from qsdp.common.user_errors import quoted
from qsdp.compat.parameter_names import checkpoint_names
from qsdp.compat.sharded_parameters import sharded_parameters

_STATE = "optimizer.state."
_BEFORE_STEPS = {"mask"}
"""What the state of a parameter that no step has changed may hold: AC/DC and GMP have masks."""


def check(path: Path) -> None:
    """Read every file of the checkpoint at ``path``, each by one rank, and compare its checksum.

    Raises:
        Damaged: On every rank, if a file is missing, truncated or altered.
        ValueError: A file cannot be read, or asks for code.
        RuntimeError: Ranks name different checkpoints.
    """
    meet_at("check", folder=path)
    _reader(path)


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, is_checked: bool = False
) -> None:
    """Put the checkpoint at ``path`` into ``model`` and ``optimizer``, in place, on any ranks.

    Before, it is read as ``check`` does, unless that ``is_checked`` already. Nothing in it is run.
    The optimizer has a state afterwards if the one that was saved had taken a step.

    Raises:
        Damaged: As ``check``.
        RuntimeError: As ``check``.
        ValueError: As ``check``; on every rank, if anything is missing or of another shape.
    """
    meet_at("load", folder=path, is_checked=is_checked)
    reader = _reader(path, is_checked=is_checked)
    with _made_ready(optimizer), _fitting(path):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        state = _load(reader, state, model)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    if not any(optimizer.state.values()):  # torch's entries of what no step has made
        optimizer.state.clear()


@contextlib.contextmanager
def _made_ready(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, an optimizer that has taken no step has neither gradients nor masks.

    With these DCP would not make the state that is read into. An exception leaves it as it was.
    """
    masks = dict(optimizer.state)
    if any(entries.keys() - _BEFORE_STEPS for entries in masks.values()):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    optimizer.state.clear()
    try:
        yield
    except BaseException:
        optimizer.state.clear()
        optimizer.state.update(masks)
        raise
    finally:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad


def load_model(path: Path, model: nn.Module) -> None:
    """Load as ``load`` does, the model alone."""
    meet_at("load_model", folder=path)
    reader = _reader(path)
    with _fitting(path):
        state = _load(reader, {"model": get_model_state_dict(model)}, model)
        set_model_state_dict(model, state["model"])


@contextlib.contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Inside, torch stumbling over values of another kind than it expects is a ValueError."""
    try:
        yield
    except (TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"{path} does not fit this model and optimizer ({type(error).__name__}): name another "
            "checkpoint."
        ) from error


def everyone() -> dist.ProcessGroup:
    """The group of all ranks. Raises RuntimeError if there is no process group."""
    if dist.group.WORLD is None:
        raise RuntimeError(
            "there is no process group of all ranks: call torch.distributed.init_process_group "
            "before checkpoints are saved or loaded, and end it after."
        )
    return dist.group.WORLD


def meet_at(call: str, *, has_news: bool = False, **facts: object) -> bool:
    world = everyone()
    told = {
        name: str(value.resolve() if isinstance(value, Path) else value)
        for name, value in facts.items()
    }
    return meet(f"checkpoint.{call}", told, [world], has_news=has_news)


def _load(reader: Reader, state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """``state`` with what the checkpoint holds."""
    names = checkpoint_names(model)
    loaded = renamed(state, names)
    if "optimizer" in loaded:
        _want_no_more(reader, loaded["optimizer"]["state"])
    frozen = {n for n, p in sharded_parameters(model).items() if not p.requires_grad}
    _check_all_is_taken(reader, loaded, frozen)
    try:
        dcp.load(loaded, storage_reader=reader, planner=ReadingPlanner())
    except CheckpointException as error:
        raise_refused(error)
        raise ValueError(
            f"{reader.path} cannot be loaded ({cause(error)}): name another checkpoint."
        ) from error
    return renamed(loaded, {clean: name for name, clean in names.items()})


def _want_no_more(reader: Reader, states: dict[str, Any]) -> None:
    """Take out of ``states`` what the checkpoint does not have of parameters without a step.

    These are the optimizer's states by parameter; one that no step has changed holds masks at most.
    """
    stored: dict[str, set[str]] = {}
    for name in reader.metadata.state_dict_metadata:
        if name.startswith(_STATE):
            owner, _, entry = name.removeprefix(_STATE).rpartition(".")
            stored.setdefault(owner, set()).add(entry)
    for name, entries in states.items():
        held = stored.get(name, set())
        if held <= _BEFORE_STEPS:
            states[name] = {key: value for key, value in entries.items() if key in held}


def _check_all_is_taken(reader: Reader, state: Mapping[str, Any], frozen: Collection[str]) -> None:
    """Raise ValueError if the checkpoint holds what would be dropped.

    That is a part of the model, or of a parameter's state, such as the mask. What is ``frozen`` now
    has no state.
    """
    taken: dict[str, Collection[str]] = {"model": state["model"]}
    optimizer = state.get("optimizer", {})
    for group in optimizer.get("param_groups", ()):
        taken |= {f"{_STATE}{name}": () for name in group["params"] if name not in frozen}
    for name, entries in optimizer.get("state", {}).items():
        taken[f"{_STATE}{name}"] = entries
    dropped = []
    for stored in reader.metadata.state_dict_metadata:
        owner, _, entry = stored.rpartition(".")
        if stored.startswith("model."):
            owner, entry = "model", stored.removeprefix("model.")
        if owner in taken and entry not in taken[owner]:
            dropped.append(stored)
    if dropped:
        raise ValueError(
            f"{reader.path} holds {listed(sorted(dropped))}, which would be lost: make model and "
            "optimizer as they were, with the same prunable set."
        )


def renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same tensors as in ``state`` by other names: DCP leaves the names of some wrappers in."""

    def by_name(values: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in values.items()}

    found = {"model": by_name(state["model"])}
    if "optimizer" in state:
        groups = [
            {**group, "params": [names.get(name, name) for name in group["params"]]}
            for group in state["optimizer"]["param_groups"]
        ]
        of_each = by_name(state["optimizer"]["state"])
        found["optimizer"] = {**state["optimizer"], "state": of_each, "param_groups": groups}
    return found


def _reader(path: Path, *, is_checked: bool = False) -> Reader:
    """A reader of the checkpoint. Raises as ``check``."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mistake = None
    try:
        if not is_checked:
            verify(path, rank, size)
        reader = Reader(path)
    except ValueError as error:
        mistake = error if isinstance(error, Damaged) else str(error)
    mistakes: list[Damaged | str | None] = [None] * size
    dist.all_gather_object(mistakes, mistake)
    # What cannot be read may be whole: it is not passed over because another file is damaged.
    for first in sorted(filter(None, mistakes), key=lambda each: isinstance(each, Damaged)):
        raise first if isinstance(first, Damaged) else ValueError(first)
    return reader


def raise_refused(error: CheckpointException) -> None:
    """Raise the first refusal among the ranks' failures, if there is one."""
    for first, _ in error.failures.values():
        if isinstance(first, Refused):
            raise first from None


def cause(error: CheckpointException) -> str:
    """The first rank's failure, on one line."""
    first = next(iter(error.failures.values()))[0]
    return quoted(f"{type(first).__name__}: {first}", 300)
