"""Pickles that are made to run code on load."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._canary}",)


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def named(module: str, name: str) -> bytes:
    """STACK_GLOBAL, which follows dots in the name."""
    return text(module) + text(name) + b"\x93"


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def _from_bytes(canary: Path) -> bytes:
    blob = io.BytesIO()
    torch.save(Evil(canary), blob)
    written = blob.getvalue()
    pushed = b"B" + len(written).to_bytes(4, "little") + written
    return called(named("torch.storage", "_load_from_bytes"), pushed)


def _through_a_path(canary: Path) -> bytes:
    """Of names that tables do hold: an enum's ``getattr`` and the class of the folder's path."""
    path = named("pathlib", "PosixPath")
    write = called(named("builtins", "getattr"), path, text("write_text"))
    return called(write, called(path, text(str(canary))), text("x"))


TRICKS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda c: called(named("posix", "system"), text(f"touch {c}")),
    "a global of protocol 0": lambda c: called(b"cos\nsystem\n", text(f"touch {c}")),
    "a dotted name": lambda c: called(
        named("torch", "serialization.os.system"), text(f"touch {c}")
    ),
    "a dotted name of a known class": lambda c: called(
        named("torch.distributed.checkpoint.metadata", "os.system"), text(f"touch {c}")
    ),
    "builtins.open": lambda c: called(named("builtins", "open"), text(str(c)), text("w")),
    "builtins.getattr": _through_a_path,
    "functools.partial": lambda c: called(
        called(named("functools", "partial"), named("posix", "system"), text(f"touch {c}"))
    ),
    "torch.storage": _from_bytes,
    "a function of torch": lambda c: called(
        named("torch.utils.collect_env", "run"), text(f"touch {c}")
    ),
}
