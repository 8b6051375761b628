"""Saving beside training: ``AsyncSaver``."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.staging import AsyncStager

from qsdp.checkpoint.all_ranks import all_ranks, meet_all_ranks
from qsdp.checkpoint.plain_values import plain_part, plain_value
from qsdp.checkpoint.saving import (
    Request,
    agreed_request,
    cannot_save,
    finished,
    folder_to_save_in,
    written,
)
from qsdp.checkpoint.state_dicts import state_to_save
from qsdp.common.collective_errors import CollectiveError, is_failure, root
from qsdp.common.rank_agreement import mistakes_shared, warn
from qsdp.common.user_errors import quoted
from qsdp.compat.process_groups import destroy_group, new_group, unique_group_name


class AsyncSaver:
    """Saves checkpoints while training goes on, one at a time.

    ``save`` waits for the one before, copies this rank's part of model and optimizer into host
    memory, and returns. A thread then writes the copy with DCP's ``async_save``, and lets the
    checkpoint appear once all ranks have written theirs. Ranks agree over a gloo group of their
    own, since collectives of two threads in one group would mix.

    Use it as a context manager, or call ``close``: either waits for the last checkpoint. A saver
    that is dropped lets it appear too; a failure is a warning then.
    """

    def __init__(self) -> None:
        """A collective over all ranks."""
        meet_all_ranks("AsyncSaver")
        self._group: _Group | None = _Group()
        self._last: list[_Writing] = []
        """The checkpoint that is being written, if any."""
        weakref.finalize(self, _leave_alone, self._last)

    def save(
        self,
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
    ) -> None:
        """Save as ``qsdp.checkpoint.save`` does, but let the checkpoint appear later.

        It holds model, optimizer and the other arguments as they are now. ``may_appear`` is called
        in another thread.

        Raises:
            ValueError: As ``save``, for what is found before anything is written; as ``wait``, for
                the checkpoint before.
            RuntimeError: As ``save``; as ``wait``; or the saver is closed.
        """
        self.wait()
        if self._group is None:
            raise RuntimeError("the saver is closed: make another one.")
        request = Request(root, step, meta, files, keep, damaged, may_appear)
        request, more = agreed_request(request, model, optimizer, tensors)
        with contextlib.ExitStack() as claim:
            folder = claim.enter_context(folder_to_save_in(request))
            state = state_to_save(model, optimizer, more)
            with mistakes_shared("checkpoint.save", [all_ranks()]):
                staged = _copied(state, "", {})
            meet_all_ranks("save", step=step)
            threads: list[threading.Thread] = []
            response: Any = dcp.async_save(
                staged,
                # Nothing is on a GPU any more, and nothing of this is to make a stream there.
                storage_writer=FileSystemWriter(folder, per_thread_copy_ahead=0),
                planner=_Planner(threads),
                process_group=self._group.group,
                async_stager=_Staged(),
            )
            future = getattr(response, "upload_completion", response)
            group, rest = self._group, claim.pop_all()
            self._last.append(_Writing(request, folder, future, threads, group, rest))

    def wait(self) -> Path | None:
        """Wait for the checkpoint that is being written, and return its folder; None without one.

        A collective.

        Raises:
            RuntimeError: On every rank, if the checkpoint could not be written.
            ValueError: On every rank, if it may not appear.
        """
        writing = self._ended()
        if writing is None:
            return None
        groups = [all_ranks()] if dist.is_initialized() else []
        with mistakes_shared("checkpoint.AsyncSaver.wait", groups):
            if writing.failure is not None:
                raise writing.failure
        meet_all_ranks("AsyncSaver.wait")
        return writing.path

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and end the group.

        No collective of all ranks: a failure is a warning. It may be called again.
        """
        writing = self._ended()
        if writing is not None:
            writing.warn()
        if self._group is not None:
            self._group.end()
            self._group = None

    def _ended(self) -> _Writing | None:
        """The checkpoint that was being written, which nobody else is told of then."""
        if not self._last:
            return None
        self._last[0].thread.join()
        return self._last.pop()

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
        world = all_ranks()
        name = f"{unique_group_name(world)}, of checkpoints"
        self.group = new_group([*range(world.size())], world, name, backend="gloo")
        self.end = weakref.finalize(self, destroy_group, self.group)
        self.end.atexit = False


class _Writing:
    """A checkpoint on its way to disk: a thread waits for DCP, then lets it appear."""

    def __init__(self, request: Request, folder: Path, *rest: Any) -> None:
        self.path: Path | None = None
        self.failure: Exception | None = None
        self.is_alone = False
        """Whether nobody waits for it any more."""
        self._step = request.step
        # Not kept here, but by the thread until it ends: DCP's future holds the copy.
        arguments = (request, folder, *rest)
        self.thread = threading.Thread(target=self._run, args=arguments, name="qsdp-checkpoint")
        self.thread.start()

    def _run(
        self,
        request: Request,
        folder: Path,
        future: Future[Any],
        threads: list[threading.Thread],
        group: _Group,
        claim: contextlib.ExitStack,
    ) -> None:
        try:
            with claim:
                with written(request):
                    future.result()
                self.path = finished(request, folder, group.group)
        except Exception as error:
            self.failure = _without_traceback(error)
        for thread in threads:
            thread.join()
        if self.is_alone:
            self.warn()

    def warn(self) -> None:
        """Say what has failed, if anything has and it was not said before."""
        failure, self.failure = self.failure, None
        if failure is not None:
            warn(f"the checkpoint of step {self._step} is not there: {quoted(failure)}.")


def _leave_alone(last: list[_Writing]) -> None:
    """Leave the last checkpoint to its thread: the saver has gone, or Python ends."""
    for writing in last:
        writing.is_alone = True
        writing.warn()  # else the thread does, when it ends


def _without_traceback(error: Exception) -> Exception:
    """``error`` without its traceback, which holds the copy of the weights."""
    if not dist.is_initialized():
        return RuntimeError(
            "the process group was destroyed before the checkpoint was written: wait for it, or "
            "close the saver, before that."
        )
    if is_failure(error):
        return CollectiveError(root(error))
    if isinstance(error, ValueError | RuntimeError):
        return (ValueError if isinstance(error, ValueError) else RuntimeError)(str(error))
    return cannot_save(f"{type(error).__name__}: {error}")


class _Staged(AsyncStager):
    """What has been copied already: ranks have to agree that all could copy."""

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
    """``value`` in host memory, sharing nothing with what training changes; tied tensors once.

    Raises Refused for what could only be loaded by running code.
    """
    if isinstance(value, Tensor):
        held = plain_part(name, value)
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
    return copy.deepcopy(plain_value(name, value))
