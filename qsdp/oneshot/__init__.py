"""Compressing a trained model in one shot, without training: a registry of solvers.

``compress_`` and ``compressed`` do so to a model in memory, plain or sharded. They load torch, and
so only when they are asked for: command lines look into the registry.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsdp.oneshot.in_memory import compress_, compressed

__all__ = ["compress_", "compressed"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qsdp.oneshot' has no attribute {name!r}.")
    return getattr(import_module("qsdp.oneshot.in_memory"), name)
