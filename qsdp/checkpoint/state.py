"""Saving and loading model and optimizer with torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from qsdp.checkpoint.folders import META, clear_killed, publish, verify, writing
from qsdp.checkpoint.folders import checksum as file_checksum
from qsdp.checkpoint.safe import TABLE, Reader, ReadingPlanner, Refused, WritingPlanner
from qsdp.checksum import checksum
from qsdp.compat import checkpoint_names, sharded_parameters
from qsdp.failures import listed
from qsdp.files import is_file_name, sync
from qsdp.meeting import meet, mistakes_shared, warn
from qsdp.meshes import Reach, ranks_of, spread_of

T = TypeVar("T")


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    meta: Mapping[str, Any],
    *,
    files: Mapping[str, str] | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` into `root`; a crash at any instant leaves it whole or absent.

    1. rank 0 makes a temporary folder;
    2. all ranks write their shards into it, exact fp32;
    3. every rank syncs the files that it wrote to disk, and takes their checksums;
    4. rank 0 adds `files` and meta.json with the checksums, syncs, renames the folder, and removes
       old checkpoints.

    Args:
        root: folder of the run's checkpoints, which every rank sees.
        step: optimizer steps done.
        model: whose parameters and buffers to save, sharded or not.
        optimizer: whose state to save; None for the model alone.
        meta: JSON values to keep with it.
        files: texts to keep with it, by file name.
        keep: how many checkpoints stay, this one and those before it; later ones stay.

    Returns: the checkpoint's folder.
    Raises: RuntimeError, on every rank, if any could not write, or if ranks differ in what they
    give; ValueError if ranks have different tensors under one name, the state holds objects that
    only code could load, or an argument is not as above.
    """
    assert dist.group.WORLD is not None
    with mistakes_shared("checkpoint.save", [dist.group.WORLD]):
        _check(step, meta, files or {}, keep)
    shards = _spread_shards(model)
    facts = {"step": step, "folder": root, "optimizer": optimizer is not None}
    facts |= {"keep": keep}
    if _meet("save", has_news=bool(shards), **facts):
        _check_names(shards)
    folder = root / f"tmp-step-{step:08d}"
    with contextlib.ExitStack() as claim:

        def begin() -> list[Path]:
            left = clear_killed(root)
            claim.enter_context(writing(root, step))
            return left

        for path in _on_first(begin):
            warn(f"{path}, which a killed run left, is removed")
        state: dict[str, Any] = {"model": get_model_state_dict(model)}
        if optimizer is not None:
            state["optimizer"] = get_optimizer_state_dict(model, optimizer)
        state = _renamed(state, checkpoint_names(model))
        try:
            dcp.save(state, checkpoint_id=folder, planner=WritingPlanner())
        except CheckpointException as error:
            _raise_refused(error)
            raise RuntimeError(
                f"the checkpoint of step {step} cannot be written to {root} ({_cause(error)}); "
                "free some space there, or choose another --out"
            ) from error
        values = {**meta, "step": step, "checksums": _checksums(folder)}
        texts = {**(files or {}), META: json.dumps(values, indent=1) + "\n"}
        return _on_first(lambda: publish(folder, texts, keep))


def _check(step: int, meta: Mapping[str, Any], files: Mapping[str, str], keep: int) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {step!r}; give an integer from 0")
    if type(keep) is not int or keep < 1:
        raise ValueError(f"keep is {keep!r}; choose 1 or more")
    if not isinstance(files, Mapping):
        raise ValueError(f"files is {files!r}; give texts by name")
    for name in files:
        if not is_file_name(name) or name in (META, TABLE) or name.endswith(".distcp"):
            raise ValueError(f"files holds {name!r}; give names of files that stand beside {META}")
    try:
        json.dumps(dict(meta))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"meta holds what JSON cannot ({error}); give JSON values") from None
    try:
        "".join([*files, *files.values()]).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(f"files holds what is no text ({error}); give texts by name") from None


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint at `path` into `model` and `optimizer`, in place, on any number of ranks.

    Every file is read once more before, each by one rank, and compared with its checksum. Nothing
    in them is run.

    Raises: ValueError, on every rank, if any part is missing, damaged, of another shape, or asks
    for code; RuntimeError if ranks name different checkpoints.
    """
    _meet("load", folder=path)
    reader = _verify(path, " by --resume PATH")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    with _fitting(path):
        state = _load(reader, state, model)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def load_model(path: Path, model: nn.Module) -> None:
    """As `load`, the model alone."""
    _meet("load_model", folder=path)
    reader = _verify(path)
    with _fitting(path):
        state = _load(reader, {"model": get_model_state_dict(model)}, model)
        set_model_state_dict(model, state["model"])


@contextlib.contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Raises ValueError where torch stumbles over values of another kind than it expects."""
    try:
        yield
    except (TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"{path} does not fit this model and optimizer ({type(error).__name__}); name another "
            "checkpoint"
        ) from error


def _meet(call: str, *, has_news: bool = False, **facts: object) -> bool:
    assert dist.group.WORLD is not None
    told = {
        name: str(value.resolve() if isinstance(value, Path) else value)
        for name, value in facts.items()
    }
    return meet(f"checkpoint.{call}", told, [dist.group.WORLD], has_news=has_news)


def _spread_shards(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...], Tensor]]:
    """By name, of what is sharded over some of the ranks: the first of these, this rank's place
    among them, and what it holds. Others may have the same, or a tensor of their own."""
    named = {n: p for n, p in sharded_parameters(model).items() if isinstance(p, DTensor)}
    try:
        spread = spread_of(named.values())
    except ValueError:  # some ranks have nothing in common
        meshes = {p.device_mesh for p in named.values()}
        spread = {mesh: Reach((), True, min(ranks_of(mesh))) for mesh in meshes}
    return {
        name: (
            spread[p.device_mesh].first_rank,
            tuple(p.device_mesh.get_coordinate() or ()),
            p.to_local(),
        )
        for name, p in named.items()
        if p.device_mesh in spread
    }


def _check_names(shards: Mapping[str, tuple[int, tuple[int, ...], Tensor]]) -> None:
    """Raise ValueError, on all ranks, if some have other tensors than others under one name."""
    mine = {n: (rank, (at, checksum([part]))) for n, (rank, at, part) in shards.items()}
    everyones = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    for name in dict.fromkeys(name for own in everyones for name in own):
        tensors: dict[int, set[object]] = {}
        for first_rank, content in (own[name] for own in everyones if name in own):
            tensors.setdefault(first_rank, set()).add(content)
        one, *others = tensors.values()
        if any(other != one for other in others):
            raise ValueError(
                f"{name} is sharded over some of the ranks, and the others have one of their own "
                "under its name, of which a checkpoint would keep one: save such parameters apart, "
                "those of each part of the ranks for themselves"
            )


def _load(reader: Reader, state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """`state` with what the checkpoint holds."""
    names = checkpoint_names(model)
    loaded = _renamed(state, names)
    _check_all_is_taken(reader, loaded)
    try:
        dcp.load(loaded, storage_reader=reader, planner=ReadingPlanner())
    except CheckpointException as error:
        _raise_refused(error)
        raise ValueError(
            f"{reader.path} cannot be loaded ({_cause(error)}); name another checkpoint"
        ) from error
    return _renamed(loaded, {clean: name for name, clean in names.items()})


def _check_all_is_taken(reader: Reader, state: Mapping[str, Any]) -> None:
    """Raise ValueError if the checkpoint holds what would be dropped: of the model, or of a
    parameter's state, the mask for one. What is frozen now has no state."""
    taken: dict[str, Collection[str]] = {"model": state["model"]}
    for name, entries in state.get("optimizer", {}).get("state", {}).items():
        taken[f"optimizer.state.{name}"] = entries
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
            "optimizer as they were, with the same prunable set"
        )


def _renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`state`, with the same tensors, by other names: DCP leaves the names of some wrappers in."""

    def by_name(values: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in values.items()}

    renamed = {"model": by_name(state["model"])}
    if "optimizer" in state:
        groups = [
            {**group, "params": [names.get(name, name) for name in group["params"]]}
            for group in state["optimizer"]["param_groups"]
        ]
        of_each = by_name(state["optimizer"]["state"])
        renamed["optimizer"] = {**state["optimizer"], "state": of_each, "param_groups": groups}
    return renamed


def _checksums(folder: Path) -> dict[str, str]:
    """The checksum of every file of DCP in `folder`, on all ranks; each rank reads its own.

    They are on disk then: DCP syncs a file before Python has written the last of its buffer.
    """
    rank = dist.get_rank()
    own: dict[str, str] = {}
    failure = None
    try:
        files = [*folder.glob(f"__{rank}_*.distcp"), *([folder / ".metadata"] if not rank else [])]
        for file in files:
            sync(file)
            own[file.name] = file_checksum(file)
    except OSError as error:
        failure = str(error)
    parts: list[tuple[dict[str, str], str | None]] = [({}, None)] * dist.get_world_size()
    dist.all_gather_object(parts, (own, failure))
    for _, failure in parts:
        if failure is not None:
            raise RuntimeError(
                f"a checkpoint cannot be read back ({failure}); choose another --out"
            )
    return {name: value for part, _ in parts for name, value in sorted(part.items())}


def _verify(path: Path, how: str = "") -> Reader:
    """A reader of the checkpoint. Raises ValueError, on every rank, unless all files are as `save`
    left them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mistake = None
    try:
        verify(path, rank, size, how=how)
        reader = Reader(path)
    except ValueError as error:
        mistake = str(error)
    mistakes: list[str | None] = [None] * size
    dist.all_gather_object(mistakes, mistake)
    for first in mistakes:
        if first is not None:
            raise ValueError(first)
    return reader


def _on_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0; all wait for it, and have its result or learn of its failure."""
    done: list[Any] = [None, None]
    failure = None
    if dist.get_rank() == 0:
        try:
            done[0] = work()
        except Exception as error:
            done[1], failure = f"{type(error).__name__}: {error}", error
    dist.broadcast_object_list(done, src=0)
    result, said = done
    if said is not None:
        said = said.removeprefix("OSError: ")
        text = f"a checkpoint cannot be written ({said}); choose another --out"
        raise RuntimeError(text) from failure
    return cast(T, result)


def _raise_refused(error: CheckpointException) -> None:
    """Raise the first refusal among the ranks' failures, if there is one."""
    for first, _ in error.failures.values():
        if isinstance(first, Refused):
            raise first from None


def _cause(error: CheckpointException) -> str:
    """The first rank's failure, on one line."""
    first = next(iter(error.failures.values()))[0]
    return " ".join(f"{type(first).__name__}: {first}".split())[:300]
