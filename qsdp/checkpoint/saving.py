"""Saving model and optimizer with torch.distributed.checkpoint (DCP).

``save`` is here, and its steps, which saving in the background has too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from qsdp.checkpoint.all_ranks import all_ranks, meet_all_ranks
from qsdp.checkpoint.crc32 import crc32_of_bytes, crc32_of_file
from qsdp.checkpoint.dcp_failures import first_failure, raise_refused
from qsdp.checkpoint.dcp_table import TABLE
from qsdp.checkpoint.folders import META, clear_killed, publish, writing
from qsdp.checkpoint.meta_json import sealed
from qsdp.checkpoint.safe_dcp import SafeSavePlanner
from qsdp.checkpoint.state_dicts import TENSORS, checked_tensors, state_to_save
from qsdp.common.atomic_files import is_file_name, sync
from qsdp.common.checksum import checksum
from qsdp.common.meshes import ranks_of
from qsdp.common.rank_agreement import mistakes_shared, warn
from qsdp.common.spread import Reach, spread_of
from qsdp.common.user_errors import quoted
from qsdp.compat.sharded_parameters import sharded_parameters

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What ``save`` was asked for, except model and optimizer.

    Until it has been ``checked``, the values may be of another type.
    """

    root: Path
    step: int
    meta: Mapping[str, Any]
    files: Mapping[str, str] | None
    keep: int
    damaged: Collection[Path]
    may_appear: Callable[[], None]

    def checked(self) -> Request:
        """The same, sharing nothing with the caller. Raises ValueError for what cannot be kept."""
        step, keep, damaged = self.step, self.keep, self.damaged
        files = {} if self.files is None else self.files
        if not isinstance(self.root, str | os.PathLike):
            raise ValueError(f"root is {self.root!r}: give the path of a folder.")
        if type(step) is not int or step < 0:
            raise ValueError(f"step is {step!r}: give an integer from 0.")
        if type(keep) is not int or keep < 1:
            raise ValueError(f"keep is {keep!r}: choose 1 or more.")
        if not isinstance(files, Mapping):
            raise ValueError(f"files is {files!r}: give texts by name.")
        for name in files:
            if not is_file_name(name) or name in (META, TABLE) or name.endswith(".distcp"):
                raise ValueError(
                    f"files holds {name!r}: give names of files that stand beside {META}."
                )
        try:
            json.dumps(dict(self.meta))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"meta holds what JSON cannot ({quoted(error)}): give JSON values."
            ) from None
        is_many = isinstance(damaged, Collection) and not isinstance(damaged, str | bytes)
        if not is_many or not all(isinstance(path, Path) for path in damaged):
            raise ValueError(f"damaged is {damaged!r}: give real paths of checkpoints.")
        if not callable(self.may_appear):
            raise ValueError(f"may_appear is {self.may_appear!r}: give a function.")
        try:
            "".join([*files, *files.values()]).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(
                f"files holds what is no text ({quoted(error)}): give texts by name."
            ) from None
        meta = copy.deepcopy(dict(self.meta))
        return replace(self, root=Path(self.root), meta=meta, files=dict(files), damaged=[*damaged])


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    meta: Mapping[str, Any],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    files: Mapping[str, str] | None = None,
    keep: int = 2,
    damaged: Collection[Path] = (),
    may_appear: Callable[[], None] = lambda: None,
) -> Path:
    """Write the checkpoint of ``step`` into ``root``; a crash leaves it whole or absent.

    1. rank 0 makes a temporary folder;
    2. all ranks write their shards into it, exact fp32;
    3. every rank syncs the files that it wrote to disk, and takes their checksums;
    4. rank 0 adds ``files`` and meta.json with all checksums, syncs, renames the folder, and
       removes what is damaged and old checkpoints.

    Args:
        root: The folder of the run's checkpoints, which every rank sees; made if it is not there.
        step: Optimizer steps done.
        model: Its parameters and buffers are saved, sharded or not.
        optimizer: Its state is saved; None for the model alone.
        meta: JSON values to keep with it.
        tensors: Further tensors to keep with it, by name, the same names on all ranks: DTensors, or
            such as are the same on all ranks. ``load_tensors`` reads them.
        files: Texts to keep with it, by file name.
        keep: How many checkpoints stay, this one and those before it; later ones stay.
        damaged: Real paths of checkpoints that are known to be damaged, on rank 0: those in
            ``root`` do not count, and go when this one is there.
        may_appear: Called on rank 0 when all is written; raises ValueError if it may not appear.

    Returns:
        The checkpoint's folder.

    Raises:
        RuntimeError: On every rank, if any could not write, or if ranks differ in what they give.
        ValueError: Ranks have different tensors under one name, the state holds objects that only
            code could load, or an argument is not as above.
    """
    request = Request(root, step, meta, files, keep, damaged, may_appear)
    request, more = agreed_request(request, model, optimizer, tensors)
    with folder_to_save_in(request) as folder:
        state = state_to_save(model, optimizer, more)
        with written(request):
            dcp.save(state, checkpoint_id=folder, planner=SafeSavePlanner())
        return finished(request, folder)


def agreed_request(
    request: Request,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    tensors: Mapping[str, Tensor] | None,
) -> tuple[Request, dict[str, Tensor]]:
    """What all ranks ask a save for, ``checked``, and the further tensors.

    Raises, on all ranks, where it cannot be kept.
    """
    with mistakes_shared("checkpoint.save", [all_ranks()]):
        request, more = request.checked(), checked_tensors(tensors)
    shards = _spread_shards(model, more)
    facts = {"step": request.step, "folder": request.root, "optimizer": optimizer is not None}
    facts |= {"keep": request.keep}
    if meet_all_ranks("save", has_news=bool(shards), tensors=tuple(more), **facts):
        _check_names(shards)
    return request, more


@contextlib.contextmanager
def folder_to_save_in(request: Request) -> Iterator[Path]:
    """A new folder for the saving of a checkpoint, which goes again if that is not ``finished``."""
    with contextlib.ExitStack() as claim:

        def begin() -> tuple[Path, list[str]]:
            lines = clear_killed(request.root, request.damaged)
            return claim.enter_context(writing(request.root, request.step)), lines

        folder, lines = _on_first(begin)
        for line in lines:
            warn(line)
        yield folder


@contextlib.contextmanager
def written(request: Request) -> Iterator[None]:
    """Inside, the saving takes place: how DCP fails in it is told in one sentence."""
    try:
        yield
    except CheckpointException as error:
        raise_refused(error)
        raise RuntimeError(
            f"the checkpoint of step {request.step} cannot be written to {request.root} "
            f"({first_failure(error)}): free some space there, or choose another --out."
        ) from error


def finished(request: Request, folder: Path, group: dist.ProcessGroup | None = None) -> Path:
    """End a save: let what is in ``folder`` appear. A collective over ``group``, of all ranks."""
    files = dict(request.files or {})
    checksums = _checksums(folder, group)
    checksums |= {name: crc32_of_bytes(text.encode()) for name, text in files.items()}
    files[META] = sealed({**request.meta, "step": request.step, "checksums": checksums})

    def appear() -> tuple[Path, list[str]]:
        request.may_appear()
        return publish(folder, request.step, files, request.keep, request.damaged)

    path, lines = _on_first(appear, group)
    for line in lines:
        warn(line)
    return path


def cannot_save(said: str) -> RuntimeError:
    """The error of a save that cannot write, of which some rank has ``said`` why."""
    said = quoted(said.removeprefix("OSError: "))
    return RuntimeError(f"a checkpoint cannot be written ({said}): choose another --out.")


def _spread_shards(
    model: nn.Module, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, tuple[int, ...], Tensor]]:
    """What is sharded over some of the ranks, by name.

    It gives the first of these ranks, this rank's place among them, and what it holds. Others may
    have the same, or a tensor of their own.
    """
    every: dict[str, Tensor] = {f"{TENSORS}.{name}": each for name, each in tensors.items()}
    every |= sharded_parameters(model)
    named = {n: p for n, p in every.items() if isinstance(p, DTensor)}
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
                "under its name, of which a checkpoint would keep only one: save the parameters of "
                "each part of the ranks apart."
            )


def _checksums(folder: Path, group: dist.ProcessGroup | None) -> dict[str, str]:
    """The checksum of every file of DCP in ``folder``, on all ranks; each rank reads its own.

    They are on disk then: DCP syncs a file before Python has written the last of its buffer.
    """
    rank = dist.get_rank()
    own: dict[str, str] = {}
    failure = None
    try:
        files = [*folder.glob(f"__{rank}_*.distcp"), *([folder / ".metadata"] if not rank else [])]
        for file in files:
            sync(file)
            own[file.name] = crc32_of_file(file)
    except Exception as error:
        failure = quoted(error)
    parts: list[tuple[dict[str, str], str | None]] = [({}, None)] * dist.get_world_size()
    dist.all_gather_object(parts, (own, failure), group=group)
    for _, failure in parts:
        if failure is not None:
            raise RuntimeError(
                f"a checkpoint cannot be read back ({failure}): choose another --out."
            )
    return {name: value for part, _ in parts for name, value in sorted(part.items())}


def _on_first(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``work`` on rank 0; all wait for it, and have its result or learn of its failure."""
    done: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            done[0] = work()
        except ValueError as error:
            done[1], failure = (str(error),), error
        except Exception as error:
            done[1], failure = f"{type(error).__name__}: {error}", error
    dist.broadcast_object_list(done, src=0, group=group)
    result, said = done
    if isinstance(said, tuple):
        raise ValueError(*said) from failure
    if said is not None:
        raise cannot_save(said) from failure
    return cast(T, result)
