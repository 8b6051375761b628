"""The processes of one run: who they are, and how they agree that all is well."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from qsdp.common.allocator import keep_freed_memory
from qsdp.common.collective_errors import collective, is_failure
from qsdp.common.user_errors import UserError, counted, quoted, sentence
from qsdp.train.run_flags import RunFlags
from qsdp.train.signals import Stop

T = TypeVar("T")

MEETING_TIMEOUT = timedelta(minutes=5)
_LOOK_AGAIN = timedelta(seconds=1)


@dataclass(frozen=True)
class World:
    """The world of a run, from one of its processes: which it is, and how all agree."""

    rank: int
    size: int
    device: torch.device
    backend: str
    """``nccl`` or ``gloo``."""
    mesh: DeviceMesh
    """One axis over all ranks."""
    stop: Stop = field(default_factory=Stop, compare=False)
    """Whether a scheduler wants the run to end.
    ``together``, ``on_main`` and ``sum`` let ranks agree.
    """

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes what there is one of."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work``, which must not communicate, on every rank and return its result.

        Raises UserError on every rank if any had a ValueError, RuntimeError or OSError: with the
        message of the first such rank.
        """
        mistake = None
        try:
            result = work()
        except (ValueError, RuntimeError, OSError, UserError) as error:
            mistake = sentence(error)
        said: list[tuple[str | None, bool]] = [(None, False)] * self.size
        with collective("agreement that all is well"):
            dist.all_gather_object(said, (mistake, self.stop.asked is not None))
        self.stop.is_agreed |= any(is_asked for _, is_asked in said)
        for first, _ in said:
            if first is not None:
                raise UserError(first, is_shared=True)
        return result

    def all_alike(self, collective: Callable[[], T]) -> T:
        """Run what communicates and fails on all ranks, or on none; errors as in ``together``."""
        mistake = None
        try:
            result = collective()
        except (ValueError, RuntimeError) as error:
            mistake = error

        def report() -> T:
            if mistake is not None:
                raise mistake
            return result

        return self.together(report)

    def on_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and return its result everywhere; errors as in ``together``."""
        results = [self.together(lambda: work() if self.is_main else None)]
        with collective("broadcast of what rank 0 found"):
            dist.broadcast_object_list(results, src=0)
        return cast(T, results[0])

    def sum(self, *values: float | Tensor) -> list[float]:
        """Add each value up over all ranks, in fp64. Waits for the device."""
        parts = [*values, self.stop.asked is not None]
        total = torch.stack(
            [torch.as_tensor(v, device=self.device).detach().double() for v in parts]
        )
        with collective("sum over all ranks"):
            dist.all_reduce(total)
            *sums, num_asked = total.tolist()
        self.stop.is_agreed |= num_asked > 0
        return sums


@contextmanager
def open_world(
    timeout_s: int = RunFlags.timeout_s, backend: str | None = RunFlags.backend
) -> Iterator[World]:
    """Meet the other ranks that torchrun started, or be a world of one without it.

    GPUs meet over NCCL, each local rank on its own, or over gloo, where local ranks share them if
    they are too few; CPUs meet over gloo. A collective waits ``timeout_s`` seconds for the others.
    Raises UserError if they do not come, or if this machine does not have what ``backend`` needs.
    """
    device = _device(backend)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()
    else:
        keep_freed_memory()
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    try:
        rank, size, store = _meet() if "RANK" in os.environ else _meet_nobody()
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        # Of the group itself: ``init_device_mesh`` would make another, of NCCL if there is a GPU.
        assert dist.group.WORLD is not None
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
        # The first collective shows whether all can reach each other. NCCL would guess its GPU from
        # the rank, which is another's where nodes have different numbers of them.
        dist.barrier(device_ids=[device.index] if backend == "nccl" else None)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the ranks did not all meet over {backend} ({quoted(error, 200)}): look for an "
            "earlier message on another node, and at the address that torchrun was given."
        ) from None
    try:
        yield World(rank, size, device, backend, mesh)
    except UserError as error:
        # All ranks are here, so taking leave of each other cannot hang; after other errors it may.
        if not is_failure(error):
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _device(backend: str | None) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if not num_gpus:
        if backend == "nccl":
            raise UserError("--backend is nccl, but this node has no GPU: leave it out.")
        return torch.device("cpu")
    if backend != "gloo" and local_rank >= num_gpus:
        raise UserError(
            f"this node has {counted(num_gpus, 'GPU')}, too few for local rank "
            f"{local_rank}, and NCCL takes one rank a GPU: lower --nproc-per-node, or let ranks "
            "share GPUs with --backend gloo."
        )
    return torch.device("cuda", local_rank % num_gpus)


def _meet_nobody() -> tuple[int, int, Any]:
    return 0, 1, cast(Any, dist).HashStore()  # public, but torch's types leave it out


def _meet() -> tuple[int, int, Any]:
    """Wait, less long than for a collective, until every rank has come to torchrun's store.

    torchrun keeps its store when it restarts ranks, and their number of restarts may differ between
    nodes. What ranks of before have left there (addresses, NCCL's id) would be taken for that of
    these, so each meeting has a part of the store to itself, which rank 0 names:

    1. Rank 0 writes down the meeting's name, then waits for a word from every other rank.
    2. A rank reads the name, which may still be that of an earlier meeting, and leaves a random
       word there.
    3. Rank 0 gives back all the words. Who finds its own has met; who does not begins again at 2.

    Returns rank, size and the part of the store. Raises RuntimeError when time is up.
    """
    store, rank, size = next(rendezvous("env://", timeout=MEETING_TIMEOUT))
    words = [f"word-{other}" for other in range(1, size)]
    if rank == 0:
        name = secrets.token_hex(8)
        here = dist.PrefixStore(f"qsdp/{name}", store)
        store.set("qsdp/meeting", name)
        here.wait(words, MEETING_TIMEOUT)
        here.set("words", json.dumps([here.get(word).decode() for word in words]))
        return rank, size, here
    own, deadline = secrets.token_hex(8), time.monotonic() + MEETING_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        here = dist.PrefixStore(f"qsdp/{store.get('qsdp/meeting').decode()}", store)
        here.set(words[rank - 1], own)
        try:
            here.wait(["words"], _LOOK_AGAIN)
        except RuntimeError:  # not all are here, or this is an earlier meeting that never was one
            continue
        if json.loads(here.get("words"))[rank - 1] == own:
            return rank, size, here
        time.sleep(_LOOK_AGAIN.total_seconds() / 10)
    raise RuntimeError(f"rank 0 or another one did not come within {MEETING_TIMEOUT}.")
