"""What a process holds that a call can leave behind: threads, process groups, files, memory."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from tests.support import patience

_ENDING_S = patience.seconds(30)
"""Threads and sockets of a process group that was destroyed end by themselves."""


@dataclass(frozen=True)
class Held:
    """What a process holds at one moment."""

    threads: Counter[str]
    """By name, those of torch and gloo included."""
    files: Counter[str]
    """Open descriptors: sockets and the like by their kind, files by their path."""
    groups: int = 0
    """Process groups that torch knows of."""

    def __sub__(self, before: Held) -> list[str]:
        """What there is more of than ``before``."""
        more = [
            f"{count} {kind} {name}"
            for kind, new in (
                ("threads", self.threads - before.threads),
                ("files", self.files - before.files),
            )
            for name, count in new.items()
        ]
        if self.groups > before.groups:
            more.append(f"{self.groups - before.groups} process groups")
        return more


def held() -> Held:
    return Held(_threads(), _files(), len(distributed_c10d._world.pg_map))


def added_since(before: Held) -> list[str]:
    """What there is more of than ``before``, after a while for what is about to end."""
    until = time.monotonic() + _ENDING_S
    while (added := held() - before) and time.monotonic() < until:
        time.sleep(0.01)
    return added


kept_open: set[str] = set()
"""What a call in this process has opened whose threads and files are for good: it adds a name."""


class Leftovers:
    """What the calls in one process leave behind."""

    def __init__(self) -> None:
        start = held()
        # torch's compiler keeps a thread.
        self._limit = Held(start.threads + Counter(python=1), start.files)
        self._kept_open: set[str] = set()
        self.max_threads = 0

    def check(self, call: str) -> None:
        """Raise AssertionError if there is more than before the first call.

        ``call``: the name of what was just called.
        """
        _let_meshes_go()
        gc.collect()
        gc.freeze()  # what is left is here to stay: the next collection need not look at it
        self.max_threads = max(self.max_threads, _threads().total())
        if more := (kept_open | _for_good()) - self._kept_open:
            self._kept_open |= more
            self._limit = held()
        if added := added_since(self._limit):
            raise AssertionError(f"{call} left behind: {', '.join(added)}")


def _for_good() -> set[str]:
    """Whose threads and files are for good: CUDA's, and the thread by which tqdm's bars move on.

    CUDA's are those of the driver, which autograd asks for GPUs in a backward pass on the CPU too,
    and those of a GPU that is used.
    """
    found = {thread.name for thread in threading.enumerate() if thread.name == "tqdm_monitor"}
    if any(name.startswith("/dev/nvidia") for name in _files()):
        found.add("driver")
    if torch.cuda.is_initialized():
        found.add("GPU")
    return found


def _let_meshes_go() -> None:
    """Let go of the process groups of meshes that torch keeps in its plans for DTensors.

    A later mesh that equals one would be taken for it, whose groups are gone: where there was one
    of more dimensions, no mesh of this call equals a later one.
    """
    meshes = [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]
    for mesh in meshes:
        getattr(mesh, "_pg_registry", {}).clear()
    if any(mesh.ndim > 1 for mesh in meshes):
        for mesh in meshes:
            mesh._thread_id = object()  # which is compared


def resident_mib() -> float:
    """Memory of the process that is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _threads() -> Counter[str]:
    names: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if not name.startswith("pt_autograd_"):  # torch 2.14 keeps some from the first backward on
            names[name] += 1
    return names


def _files() -> Counter[str]:
    found: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:  # the one that lists them
            continue
        if not target.endswith(".ttf"):  # matplotlib keeps the fonts that it draws with
            found[target.partition(":")[0] if ":[" in target else target] += 1
    return found
