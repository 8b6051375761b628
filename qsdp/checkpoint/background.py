"""Saving beside training: `AsyncSaver`."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor

from qsdp import compat
from qsdp.checkpoint.safe import readable
from qsdp.checkpoint.saving import Request, agree, claimed, finished, state_of, written
from qsdp.checkpoint.state import meet_at
from qsdp.failures import CollectiveError, is_failure, root
from qsdp.meeting import mistakes_shared, warn


class AsyncSaver:
    """Saves checkpoints while training goes on, one at a time.

    `save` waits for the one before, copies this rank's part of model and optimizer into host
    memory, and returns. A thread then writes the copy with DCP's `async_save`, and lets the
    checkpoint appear once all ranks have written theirs. Ranks agree over a gloo group of their
    own, since collectives of two threads in one group would mix.

    Use it as a context manager, or call `close`: either waits for the last checkpoint. A saver that
    is dropped lets it appear too, but nobody hears of a failure.
    """

    def __init__(self) -> None:
        """A collective over all ranks."""
        meet_at("AsyncSaver")
        self._group: _Group | None = _Group()
        self._writing: _Writing | None = None

    def save(
        self,
        root: Path,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        meta: Mapping[str, Any],
        *,
        files: Mapping[str, str] | None = None,
        keep: int = 2,
        damaged: Collection[Path] = (),
        may_appear: Callable[[], None] = lambda: None,
    ) -> None:
        """As `qsdp.checkpoint.save`, but that the checkpoint appears later, as model, optimizer and
        the other arguments are now. `may_appear` is called in another thread.

        Raises: as `save`, for what is found before anything is written; as `wait`, for the
        checkpoint before.
        """
        self.wait()
        if self._group is None:
            raise RuntimeError("the saver is closed; make another one")
        request = Request(root, step, meta, files or {}, keep, tuple(damaged), may_appear)
        agree(request, model, optimizer)
        request = replace(request, meta=copy.deepcopy(dict(meta)), files=dict(request.files))
        assert dist.group.WORLD is not None
        with contextlib.ExitStack() as claim:
            claim.enter_context(claimed(request))
            state = state_of(model, optimizer)
            with mistakes_shared("checkpoint.save", [dist.group.WORLD]):
                staged = _copied(state, "", {})
            meet_at("save", step=step)
            threads: list[threading.Thread] = []
            response: Any = dcp.async_save(
                staged,
                # Nothing is on a GPU any more, and nothing of this is to make a stream there.
                storage_writer=FileSystemWriter(request.folder, per_thread_copy_ahead=0),
                planner=_Planner(threads),
                process_group=self._group.group,
                async_stager=_Staged(),
            )
            future = getattr(response, "upload_completion", response)
            self._writing = _Writing(request)
            self._writing.start(future, threads, claim.pop_all(), self._group)

    def wait(self) -> Path | None:
        """Wait for the checkpoint that is being written, and return it; None without one.

        A collective. Raises, on every rank, RuntimeError if it could not be written, ValueError if
        it may not appear.
        """
        if self._writing is None:
            return None
        self._writing.join()
        writing, self._writing = self._writing, None
        assert dist.group.WORLD is not None
        with mistakes_shared("checkpoint.AsyncSaver.wait", [dist.group.WORLD]):
            if writing.failure is not None:
                raise writing.failure
        meet_at("AsyncSaver.wait")
        return writing.path

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and end the group. No collective of all
        ranks: a failure is a warning. May be called again."""
        if self._writing is not None:
            self._writing.join()
            writing, self._writing = self._writing, None
            if writing.failure is not None:
                warn(str(writing.failure))
        if self._group is not None:
            self._group.end()
            self._group = None

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()


class _Group:
    """A gloo group of all ranks that ends with this object."""

    def __init__(self) -> None:
        world = dist.group.WORLD
        assert world is not None
        name = f"{compat.unused_name(world)}, of checkpoints"
        self.group = compat.new_group([*range(world.size())], world, name, backend="gloo")
        self.end = weakref.finalize(self, compat.destroy_group, self.group)
        self.end.atexit = False


@dataclass
class _Writing:
    """A checkpoint on its way to disk."""

    request: Request
    path: Path | None = None
    failure: Exception | None = None
    _thread: threading.Thread | None = None

    def start(
        self,
        future: Future[Any],
        threads: list[threading.Thread],
        claim: contextlib.ExitStack,
        group: _Group,
    ) -> None:
        arguments = (self, future, threads, claim, group)
        self._thread = threading.Thread(target=_write, args=arguments, name="qsdp-checkpoint")
        self._thread.start()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join()


def _write(
    writing: _Writing,
    future: Future[Any],
    threads: list[threading.Thread],
    claim: contextlib.ExitStack,
    group: _Group,
) -> None:
    """Wait for DCP, then let the checkpoint appear."""
    try:
        with claim:
            with written(writing.request):
                future.result()
            writing.path = finished(writing.request, group.group)
    except Exception as error:
        writing.failure = _told(error)
    for thread in threads:
        thread.join()


def _told(error: Exception) -> Exception:
    """`error` without its traceback, which holds the copy of the weights."""
    if is_failure(error):
        return CollectiveError(root(error))
    if isinstance(error, ValueError | RuntimeError):
        return (ValueError if isinstance(error, ValueError) else RuntimeError)(str(error))
    said = f"{type(error).__name__}: {error}"
    return RuntimeError(f"a checkpoint cannot be written ({said}); choose another --out")


class _Staged(AsyncStager):
    """For what has been copied already: ranks have to agree that all could."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def synchronize_staging(self) -> None:
        return None

    def close(self) -> None:
        return None


class _Planner(DefaultSavePlanner):
    """Tells which thread DCP writes in."""

    def __init__(self, threads: list[threading.Thread]) -> None:
        super().__init__()
        self._threads = threads

    def create_local_plan(self) -> SavePlan:
        self._threads.append(threading.current_thread())
        return super().create_local_plan()


def _copied(value: Any, name: str, copies: dict[Any, Tensor]) -> Any:
    """`value` in host memory, sharing nothing with what training changes; tied tensors once.

    Raises Refused for what could only be loaded by running code.
    """
    if isinstance(value, Tensor):
        held = value.to_local() if isinstance(value, DTensor) else value
        layout = (type(value), value.dtype, value.shape, held.shape, held.stride())
        place = (held.device, held.data_ptr() or id(value), layout)  # without values: at no address
        if place not in copies:
            copies[place] = value.detach().to("cpu", copy=True)
        return copies[place]
    inner = f"{name}." if name else ""
    if isinstance(value, Mapping):
        return {key: _copied(each, f"{inner}{key}", copies) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(e, f"{inner}{i}", copies) for i, e in enumerate(value))
    return copy.deepcopy(readable(name, value))
