"""Loading model and optimizer with torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from qsdp.checkpoint.all_ranks import all_ranks, meet_all_ranks
from qsdp.checkpoint.dcp_failures import first_failure, raise_refused
from qsdp.checkpoint.safe_dcp import SafeLoadPlanner, SafeReader
from qsdp.checkpoint.state_dicts import TENSORS, checked_tensors, renamed_state
from qsdp.checkpoint.verifying import verified_reader
from qsdp.common.rank_agreement import mistakes_shared
from qsdp.common.user_errors import names_for_user
from qsdp.compat.parameter_names import checkpoint_names
from qsdp.compat.sharded_parameters import sharded_parameters

_STATE = "optimizer.state."
_BEFORE_STEPS = {"mask"}
"""What the state of a parameter that no step has changed may hold: AC/DC and GMP have masks."""


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, is_checked: bool = False
) -> None:
    """Load the checkpoint at ``path`` into ``model`` and ``optimizer``, in place.

    The number of ranks may be another than that which saved it. Before, it is read as ``check``
    does, unless that ``is_checked`` already. Nothing in it is run. The optimizer has a state
    afterwards if the one that was saved had taken a step.

    Raises:
        Damaged: As ``check``.
        RuntimeError: As ``check``.
        ValueError: As ``check``; on every rank, if anything is missing or of another shape.
    """
    meet_all_ranks("load", folder=path, is_checked=is_checked)
    reader = verified_reader(path, is_checked=is_checked)
    with _ready_to_load(optimizer), _fitting(path):
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
def _ready_to_load(optimizer: torch.optim.Optimizer) -> Iterator[None]:
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
    """Load the model alone from the checkpoint at ``path``, as ``load`` does."""
    meet_all_ranks("load_model", folder=path)
    reader = verified_reader(path)
    with _fitting(path):
        state = _load(reader, {"model": get_model_state_dict(model)}, model)
        set_model_state_dict(model, state["model"])


def load_tensors(path: Path, tensors: Mapping[str, Tensor], *, is_checked: bool = False) -> None:
    """Load what the checkpoint at ``path`` keeps of further tensors, into ``tensors`` in place.

    Those are what ``save`` was given beside model and optimizer, by the same names. Others that it
    keeps are left out. The number of ranks may be another than that which saved them.

    Raises:
        Damaged: As ``check``.
        RuntimeError: As ``check``; or ranks give other names.
        ValueError: As ``check``; on every rank, if any is missing, or of another shape or dtype.
    """
    call, given = "checkpoint.load_tensors", dict[str, Tensor]()
    with mistakes_shared(call, [all_ranks()]):
        given = checked_tensors(tensors)
    meet_all_ranks("load_tensors", folder=path, is_checked=is_checked, tensors=tuple(given))
    reader = verified_reader(path, is_checked=is_checked)
    with mistakes_shared(call, [all_ranks()]):
        _check_are_stored(reader, given)
    meet_all_ranks("load_tensors")
    if given:
        with _fitting(path):
            _read(reader, {TENSORS: given})


def _check_are_stored(reader: SafeReader, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the checkpoint has ``tensors`` of these shapes and dtypes."""
    stored = reader.metadata.state_dict_metadata
    missing = [name for name in tensors if f"{TENSORS}.{name}" not in stored]
    if missing:
        raise ValueError(
            f"{reader.path} has nothing of {names_for_user(missing)} beside model and optimizer: "
            "name a checkpoint that was saved with them."
        )
    for name, tensor in tensors.items():
        held = stored[f"{TENSORS}.{name}"]
        found = (
            (held.properties.dtype, tuple(held.size))
            if isinstance(held, TensorStorageMetadata)
            else ("no tensor", ())
        )
        if found != (tensor.dtype, tuple(tensor.shape)):
            raise ValueError(
                f"{reader.path} has {name} as {found[0]} of shape {found[1]}, but {tensor.dtype} "
                f"of shape {tuple(tensor.shape)} is asked for: name another checkpoint."
            )


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


def _load(reader: SafeReader, state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """``state`` with what the checkpoint holds."""
    names = checkpoint_names(model)
    loaded = renamed_state(state, names)
    if "optimizer" in loaded:
        _want_no_more(reader, loaded["optimizer"]["state"])
    frozen = {n for n, p in sharded_parameters(model).items() if not p.requires_grad}
    _check_all_is_taken(reader, loaded, frozen)
    _read(reader, loaded)
    return renamed_state(loaded, {clean: name for name, clean in names.items()})


def _read(reader: SafeReader, state: dict[str, Any]) -> None:
    """Let DCP read what the checkpoint holds into ``state``."""
    try:
        dcp.load(state, storage_reader=reader, planner=SafeLoadPlanner())
    except CheckpointException as error:
        raise_refused(error)
        raise ValueError(
            f"{reader.path} cannot be loaded ({first_failure(error)}): name another checkpoint."
        ) from error


def _want_no_more(reader: SafeReader, states: dict[str, Any]) -> None:
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


def _check_all_is_taken(
    reader: SafeReader, state: Mapping[str, Any], frozen: Collection[str]
) -> None:
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
            f"{reader.path} holds {names_for_user(sorted(dropped))}, which would be lost: make "
            "model and optimizer as they were, with the same prunable set."
        )
