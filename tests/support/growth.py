"""What a process holds that can grow with every step: it is counted, and compared later."""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
import types
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import patience

_CONTAINERS = (dict, list, set, frozenset, tuple, deque)


class Experts(nn.Module):
    """Of its layers others take part in every step."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(number))
        self.chosen: tuple[int, ...] = ()

    def forward(self, x_BC: Tensor) -> Tensor:
        return x_BC + torch.stack([torch.tanh(self.layers[i](x_BC)) for i in self.chosen]).sum(0)


def held() -> Counter[str]:
    """How much there is now of each kind, by its name.

    Objects of the package's own types, and functions, partial ones and generators of its own,
    whoever holds them: hooks are such. The entries of what these objects, the package's modules
    and its caches hold in containers. Tensors of Python, and the bytes of their memory. Files and
    threads of the process.
    """
    gc.collect()
    found: Counter[str] = Counter()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            found["tensors"] += 1
            if thing.device.type != "meta":
                storage = thing.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
        elif name := _own_name(thing):
            found[name] += 1
            for place, entries in _attributes(thing):
                found[f"entries of {name}.{place}"] += _num_entries(entries)
    for name, module in [*sys.modules.items()]:
        if _is_own(name):
            for place, value in vars(module).items():
                found[f"entries of {name}.{place}"] += _num_entries(value)
                found[f"results of {name}.{place}"] += _num_results(value)
    found["bytes of tensors"] = sum(storages.values())
    found["open files"] = sum(1 for _ in Path("/proc/self/fd").iterdir())
    found["threads"] = len(os.listdir("/proc/self/task"))
    return found


def grown_since(before: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """What there is more of than ``before``: then and now.

    It waits a while for what threads of torch are about to drop.
    """
    until = time.monotonic() + patience.seconds(5)
    while True:
        now = held()
        more = {
            name: (before.get(name, 0), n) for name, n in now.items() if n > before.get(name, 0)
        }
        if not more or time.monotonic() > until:
            return more
        time.sleep(0.05)


def _is_own(module: object) -> bool:
    return isinstance(module, str) and (module == "qsdp" or module.startswith("qsdp."))


def _own_name(thing: Any) -> str:
    """Empty for what is not of the package."""
    if isinstance(thing, types.GeneratorType):
        module, name = thing.gi_frame and thing.gi_frame.f_globals.get("__name__"), thing.__name__
    elif isinstance(thing, functools.partial):
        module, name = (getattr(thing.func, place, None) for place in ("__module__", "__name__"))
        name = f"partial of {name}"
    elif isinstance(thing, types.FunctionType):
        module, name = thing.__module__, thing.__qualname__
    elif isinstance(thing, type):
        return ""
    else:
        module, name = type(thing).__module__, type(thing).__name__
    return f"{module}.{name}" if _is_own(module) else ""


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(thing, "__dict__", {}).items()
    if isinstance(thing, _CONTAINERS):
        yield "itself", thing


def _num_entries(value: Any, depth: int = 3) -> int:
    """Of a container, and of those in it."""
    if not isinstance(value, _CONTAINERS) and not hasattr(value, "data"):
        return 0
    if not isinstance(value, _CONTAINERS):  # weak ones hold a container
        value = value.data
        if not isinstance(value, _CONTAINERS):
            return 0
    inner = value.values() if isinstance(value, dict) else value
    return len(value) + (sum(_num_entries(v, depth - 1) for v in [*inner]) if depth else 0)


def _num_results(value: Any) -> int:
    """That a function has cached."""
    info = getattr(value, "cache_info", None)
    return info().currsize if callable(info) else 0
