"""What a checkpoint may hold: plain tensors, and values that are loaded without running code."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Refused(ValueError):
    """A checkpoint holds, or would, what is no plain value; the message is the whole sentence."""


def not_plain(path: Path, name: str) -> Refused:
    """The error that a file at ``path`` asks for ``name``, which is no plain value."""
    return Refused(
        f"{path} asks for {name[:100]!r} to be loaded, which no checkpoint needs, could run code "
        "and is refused: name another checkpoint."
    )


@contextmanager
def plain_only() -> Iterator[None]:
    """Inside, torch's restricted unpickler makes plain values only.

    It makes no object of the classes on its list of additions. torch itself adds some, and one of
    them, DeviceMesh, opens process groups.
    """
    given = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(given)


def _without_numpy(value: Any) -> Any:
    """NumPy's numbers as Python's, in nested lists, tuples and dicts too."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy, value))
    if type(value) is dict:
        return {key: _without_numpy(inner) for key, inner in value.items()}
    return value


def plain_part(name: str, tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, for a checkpoint of plain values.

    Raises Refused for a tensor of another class, for example an 8-bit optimizer's: code would have
    to make it.
    """
    with torch.no_grad():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if type(part) not in (Tensor, nn.Parameter):
        raise _no_plain_value(name, type(part))
    return part


def plain_value(name: str, value: object) -> Any:
    """``value`` as a plain value, which a load gives later. Raises Refused if it could not."""
    value = _without_numpy(value)
    written = io.BytesIO()
    try:
        torch.save(value, written)
        written.seek(0)
        with plain_only():
            torch.load(written, weights_only=True)
    except Exception:  # pickling calls the value's own methods
        raise _no_plain_value(name, type(value)) from None
    return value


def _no_plain_value(name: str, kind: type) -> Refused:
    return Refused(
        f"{name} is or holds an object ({_name_of(kind)}) that could only be loaded by running "
        "code, which a checkpoint never does: keep plain tensors, numbers, strings, and lists, "
        "tuples and dicts of these."
    )


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
