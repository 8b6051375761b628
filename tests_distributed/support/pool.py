"""Worker processes that live as long as the test session, one pool for each world size.

Starting torch costs seconds, a call of a living pool costs milliseconds. Every call gets a new
default process group, which meets through a new store file, so nothing of one test reaches the
next; a call that leaves threads, groups or files behind has failed; a pool in which a call failed
is killed, and the next call starts another.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import itertools
import multiprocessing.process
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from tests.support import patience
from tests_distributed.support import leftovers

MAX_WORLD_SIZE = 4
GLOO_TIMEOUT_S = patience.seconds()
CALL_TIMEOUT_S = patience.seconds()
GRACE_S = patience.seconds(1)
ENDING_S = patience.seconds(30)
"""For what happens by itself, soon as a rule."""
REPOSITORY = Path(__file__).resolve().parents[2]
# What every worker would else import by itself: what FSDP2 and the trainer import when they are
# first used is among it, and the test modules are added. None of it may ask for a GPU or start a
# thread.
preloaded = [
    "torch.distributed.fsdp",
    "torch.testing",
    "torch._dynamo",
    "torch.distributed.nn",  # it keeps the process group that there is when it is imported
    "torch.distributed.checkpoint._fsspec_filesystem",
    "qsdp.train.loop",
    "qsdp.fsdp.install",
    "tyro._backends._tyro_backend",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def meets_by_itself(function: Function) -> Function:
    """Mark a function that wants no default process group from the pool.

    Its first arguments are the path of a new store file, its rank and the world size.
    """
    cast(Any, function).meets_by_itself = True
    return function


class RankError(RuntimeError):
    """A call failed on some rank; the message holds that rank's traceback or stacks."""


class Pools:
    """The pools of one test session, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is an empty folder for store files and stack dumps."""
        self._folder = folder
        self._pools: dict[int, Pool] = {}
        self._count = itertools.count()
        self.max_threads = 0
        """The most that a worker had after a call."""

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = CALL_TIMEOUT_S,
    ) -> list[Any]:
        """Call ``function(*args)`` on every rank of a gloo world and return the ranks' results.

        Args:
            world_size: 1 to 4 processes.
            function: A function at the top level of a module: workers import it by name. It finds
                the default process group initialised and torch's generator seeded with 0.
            args: Anything that pickles, the same for every rank; tensors are copied.
            timeout: Seconds after which the call counts as hung.

        Returns:
            What each rank returned, in rank order; tensors are copies.

        Raises:
            RankError: With the traceback of the rank that failed first, or, after ``timeout``, with
                the stacks of the ranks that did not answer.
            ValueError: The world size is not 1 to 4 or the call does not pickle.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size is {world_size}, but a pool has 1 to {MAX_WORLD_SIZE}")
        try:
            call = pickle.dumps((function, args))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{function} or its arguments do not pickle ({error}): "
                "pass a function at the top level of a module and plain arguments"
            ) from error
        pool = self._pools.pop(world_size, None)
        if pool is None:
            pool = Pool(world_size, self._new_folder())
        try:
            results = pool.call(call, timeout)
        except BaseException:
            pool.kill()
            raise
        finally:
            self.max_threads = max(self.max_threads, pool.max_threads)
        self._pools[world_size] = pool
        return results

    def close(self) -> None:
        """End every worker."""
        while self._pools:
            self._pools.popitem()[1].kill()

    def _new_folder(self) -> Path:
        folder = self._folder / f"pool-{next(self._count)}"
        folder.mkdir()
        return folder


class Pool:
    """``world_size`` worker processes, each at the other end of a pipe."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self._folder = folder
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._num_calls = 0
        self.max_threads = 0
        """In one worker, after a call."""
        # A fork server imports torch once: a worker is then a fork of it, which takes milliseconds
        # and shares its memory.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(preloaded)
        with _worker_environment():
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, world_size, theirs, self._stacks(rank)), daemon=True
                )
                process.start()
                theirs.close()  # or the end of the worker would not end the pipe
                self._processes.append(process)
                self._pipes.append(ours)

    def call(self, call: bytes, timeout: float) -> list[Any]:
        """Send a pickled (function, args) to every worker and collect the results."""
        store = self._folder / f"store-{self._num_calls}"
        self._num_calls += 1
        results: dict[int, Any] = {}
        failures: list[tuple[int, int, str]] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(pickle.dumps((str(store), call)))
            except OSError:
                failures.append((0, rank, self._epitaph(rank)))
        until = time.monotonic() + timeout
        waiting = set(range(len(self._pipes)))
        while waiting:
            # After a first failure the others are only heard out: one of them may have failed
            # earlier, and the rest stand in a collective that never ends.
            if failures:
                until = min(until, time.monotonic() + GRACE_S)
            ready = multiprocessing.connection.wait(
                [self._pipes[rank] for rank in waiting], max(0.0, until - time.monotonic())
            )
            if not ready:
                break
            for rank in [rank for rank in waiting if self._pipes[rank] in ready]:
                waiting.discard(rank)
                try:
                    failed_ns, value = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    # A death precedes the connection errors that it gives the others.
                    failed_ns, value = 0, self._epitaph(rank)
                if failed_ns is None:
                    results[rank], num_threads = value
                    self.max_threads = max(self.max_threads, num_threads)
                else:
                    failures.append((failed_ns, rank, value))
        world_size = len(self._pipes)
        if failures:
            _, rank, text = min(failures)
            raise RankError(f"rank {rank} of {world_size} failed:\n{text}")
        if waiting:
            silent = ", ".join(map(str, sorted(waiting)))
            stacks = "\n".join(self._dump_stacks(sorted(waiting)))
            raise RankError(
                f"ranks {silent} of {world_size} did not answer in {timeout:g} s:\n{stacks}"
            )
        store.unlink(missing_ok=True)
        return [results[rank] for rank in range(world_size)]

    def strike(self) -> None:
        """SIGKILL the workers at once, whatever they do; a call in another thread then fails."""
        for process in self._processes:
            process.kill()

    def kill(self) -> None:
        """End the workers at once, whatever they do."""
        self.strike()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()

    def _stacks(self, rank: int) -> Path:
        return self._folder / f"stacks-{rank}"

    def _epitaph(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(ENDING_S)
        stacks = self._stacks(rank)
        text = stacks.read_text() if stacks.exists() else ""
        return f"the process ended with exit code {process.exitcode}\n{text}"

    def _dump_stacks(self, ranks: list[int]) -> Iterator[str]:
        for rank in ranks:
            pid = self._processes[rank].pid
            assert pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        until = time.monotonic() + ENDING_S  # a stopped process writes nothing
        while not all(self._stacks(rank).stat().st_size for rank in ranks):
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        time.sleep(GRACE_S)  # the end of a signal handler is not told
        for rank in ranks:
            yield f"stacks of rank {rank}:\n{self._stacks(rank).read_text()}"


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """Environment variables and import path of the workers, while they are being started."""
    variables = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # torch's compiler would start processes of its own, and threads that wait for them.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # A fork server that asked CUDA itself for GPUs could fork no worker that uses one.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    # Without a name gloo asks what the host name resolves to, which a container may not know.
    if any(name == "lo" for _, name in socket.if_nameindex()):
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    before = {name: os.environ.get(name) for name in variables}
    path = list(sys.path)
    os.environ.update(variables)
    sys.path.insert(0, str(REPOSITORY))
    try:
        yield
    finally:
        sys.path[:] = path
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(
    rank: int, world_size: int, pipe: multiprocessing.connection.Connection, stacks: Path
) -> None:
    """The life of a worker: answer calls until the pipe ends."""
    dump = stacks.open("w")
    faulthandler.enable(dump)
    faulthandler.register(signal.SIGUSR2, dump, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    gc.freeze()  # the modules live for ever: collecting after each call need not look at them
    left = leftovers.Leftovers()
    while True:
        try:
            store, call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            function, args = pickle.loads(call)
            result = _call(rank, world_size, store, function, args)
            left.check(str(function))
            answer = pickle.dumps((None, (result, left.max_threads)))
        except BaseException:
            answer = pickle.dumps((time.monotonic_ns(), traceback.format_exc()))
        try:
            pipe.send_bytes(answer)
        except OSError:
            return


def _call(
    rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    if getattr(function, "meets_by_itself", False):
        return function(store, rank, world_size, *args)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=GLOO_TIMEOUT_S),
    )
    result = function(*args)
    # A rank that closed its sockets early would be the error that the others report.
    dist.barrier()
    dist.destroy_process_group()
    return result


def meet(store: str, rank: int, size: int, backend: str | None) -> dist.ProcessGroup:
    """The default process group, of ``backend`` or of what torch takes without being told."""
    dist.init_process_group(
        backend,
        store=torch.distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=GLOO_TIMEOUT_S),
    )
    assert dist.group.WORLD is not None
    return dist.group.WORLD
