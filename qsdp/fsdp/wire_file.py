"""The wire's state in a file of its own, for checkpoints of libraries that have no place for it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qsdp.common.atomic_files import replacing
from qsdp.common.rank_agreement import meet, mistakes_shared, warn
from qsdp.compat.interrupted_passes import abandon_passes
from qsdp.fsdp.handle import Handle
from qsdp.fsdp.whole_state import load_whole_state, whole_state

_NAME = "qsdp_wire.bin"
_DIGEST_BYTES = 16


def save_wire(handle: Handle, folder: Path, *, is_writer: bool) -> None:
    """Write ``whole_state`` of the wire to a file of ``folder``, all or nothing. A collective.

    Args:
        handle: Of the wire.
        folder: A checkpoint of another library, which is there.
        is_writer: Whether this rank writes it: one of each file system does.
    """
    state = whole_state(handle)
    if not is_writer:
        return
    archive = io.BytesIO()
    torch.save(state, archive)
    with replacing(folder / _NAME) as temporary, temporary.open("wb") as file:
        file.write(_digest(archive.getbuffer()))
        file.write(archive.getbuffer())


def load_wire(handle: Handle, folder: Path) -> None:
    """Load what ``save_wire`` has written, as ``load_whole_state`` does. A collective.

    Where the file is missing a UserWarning says that the wire begins anew.

    Raises:
        ValueError: The file is damaged; or as ``load_whole_state``.
        RuntimeError: Ranks do not find the same.
    """
    path = folder / _NAME
    call, everyone = "load_wire", [dist.group.WORLD] if dist.group.WORLD is not None else []
    with mistakes_shared(call, everyone):
        digest, state = _read(path)
    meet(call, {f"the digest of {path.name}": digest or "missing"}, everyone)
    if state is not None:
        load_whole_state(handle, state)
        return
    warn(
        f"{path} is missing, the state of the wire, which begins anew: restore it where the "
        "training shall go on bit for bit."
    )


def save_wires(models: Iterable[nn.Module], folder: str) -> None:
    """Save the wires of ``models`` to a checkpoint of Accelerate's. A collective.

    Each model's ``_qsdp_handle`` has its wire, whose folder bears the number of the model.
    """
    for _, handle, path in _wires(models, folder):
        path.mkdir(exist_ok=True)
        save_wire(handle, path, is_writer=dist.get_rank() == 0)


def load_wires(models: Iterable[nn.Module], folder: str) -> None:
    """Load what ``save_wires`` has saved. Gradients that were accumulated before are dropped."""
    for model, handle, path in _wires(models, folder):
        abandon_passes(model)
        model.zero_grad()
        load_wire(handle, path)


def _wires(models: Iterable[Any], folder: str) -> Iterator[tuple[nn.Module, Handle, Path]]:
    for index, model in enumerate(models):
        handle = getattr(model, "_qsdp_handle", None)
        if handle is not None and not handle._is_removed:
            yield model, handle, Path(folder, f"qsdp_{index}")


def _read(path: Path) -> tuple[str, Any]:
    """The digest of the file ``path`` and the state in it; nothing if there is no such file."""
    if not path.is_file():
        return "", None
    raw = path.read_bytes()
    digest, archive = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if _digest(archive) != digest:
        raise ValueError(
            f"{path} is damaged: restore it, or remove it to go on with a wire that begins anew."
        )
    state = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    return digest.hex(), state


def _digest(archive: bytes | memoryview) -> bytes:
    return blake2b(archive, digest_size=_DIGEST_BYTES).digest()
