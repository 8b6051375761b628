"""The folder of an export, which holds a compressed model, and how it is read.

model.safetensors      every parameter under its own name, dense, pruned weights exactly +0.0; where
                       it would be too large, in several files with model.safetensors.index.json, as
                       Hugging Face has them
masks.safetensors      by the name of each prunable parameter, which of its weights were kept: uint8
                       [ceil(weights / 8)], bit i % 8 (from the lowest) of byte i // 8 for weight i
                       in row-major order; bits past the end are 0. A kept weight may be 0 too. In
                       several files as above
compression.json       what was done: target, method (older ones lack it: magnitude), patterns of
                       the prunable set, zeros by tensor, over the set and over the model; the
                       source's path and step, the model's size, the run's settings; the checksums
                       of all files and, at the end, its own, as in meta.json of a checkpoint (older
                       ones lack both)
tokenizer.json         the run's tokenizer, if it has one
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qsdp.checkpoint import OWN_CHECKSUM, Damaged, lists, on_all_ranks, sealed, verify_files
from qsdp.common.atomic_files import is_file_name
from qsdp.common.bitmask import PackedMask
from qsdp.common.user_errors import quoted
from qsdp.models.load_safetensors import fill, find_tensors

FACTS = "compression.json"
TOKENIZER = "tokenizer.json"
CHECKSUMS = "checksums"
FORMAT = "qsdp-compressed-1"
MASKS_FORMAT = "qsdp-masks-1"


def read_facts(folder: Path) -> dict[str, Any]:
    """What compression.json of an export of a run says.

    Raises ValueError as ``read_record``, and if it does not say all that of a run.
    """
    facts = read_record(folder)
    parts = {"model": dict, "config": dict, "source": dict, "target": str}
    if "method" in facts:
        parts["method"] = str
    if not all(isinstance(facts.get(name), kind) for name, kind in parts.items()):
        raise _not_ours(folder)
    return facts


def read_record(folder: Path) -> dict[str, Any]:
    """What compression.json of any export says.

    Raises ValueError if it cannot be read, is another file's, or is not as it was written.
    """
    path = folder / FACTS
    try:
        text = path.read_bytes().decode("utf-8")
        facts = json.loads(text)
        # One entry tells that there is a seal, should a bit of the other's name have flipped.
        has_seal = isinstance(facts, dict) and bool({CHECKSUMS, OWN_CHECKSUM} & facts.keys())
        is_altered = has_seal and sealed(facts) != text
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({quoted(error)}): export the model again."
        ) from None
    if is_altered:
        raise _again(Damaged(folder, FACTS, "its checksum is not the one that it states"))
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise _not_ours(folder)
    checksums = facts.get(CHECKSUMS, {})
    if not isinstance(checksums, dict) or not all(map(is_file_name, checksums)):
        raise _not_ours(folder)
    return facts


def verify_export(
    folder: Path,
    rank: int = 0,
    size: int = 1,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Verify this rank's part of an export's files, as ``checkpoint.verify`` does a checkpoint's.

    Older exports have no checksums, and are taken as they are. Raises ValueError for a file that is
    missing, truncated or altered, or cannot be read.
    """
    try:
        stated = read_record(folder).get(CHECKSUMS, {})
        verify_files(folder, stated, FACTS, rank, size, progress)
    except Damaged as error:
        raise _again(error) from None


def check_export(folder: Path) -> None:
    """Verify the whole export, all ranks together: each file is read by one rank.

    Raises ValueError as ``verify_export``, on every rank.
    """
    on_all_ranks(lambda rank, size: verify_export(folder, rank, size))


def load_export(folder: Path, model: nn.Module, *, is_checked: bool = False) -> None:
    """Fill ``model`` from an export, in place, plain or sharded by FSDP2.

    Each rank reads its slices alone, after verifying all files, unless that ``is_checked`` already:
    with many ranks, ``check_export`` before this reads each file once.

    Raises:
        ValueError: A file is damaged, or a tensor is missing, of another shape or none of the
            model's.
    """
    if not is_checked:
        verify_export(folder)
    fill(model, folder, _listed_tensors(folder), lambda name: (name, False))


class ExportReader:
    """Reads an export tensor by tensor, as ``checkpoint.TensorReader`` reads a checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a file that is missing or not readable."""
        self._folder = folder
        self._files = _listed_tensors(folder)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the parameter ``name``."""
        with safe_open(self._files[name], framework="pt") as tensors:
            first: Tensor = tensors.get_slice(name)[:1]
        return first.dtype

    def check(self, name: str, shape: torch.Size) -> None:
        """Raise ValueError unless there is a parameter ``name`` of this shape."""
        stored = None
        if name in self._files:
            with safe_open(self._files[name], framework="pt") as tensors:
                stored = tuple(tensors.get_slice(name).get_shape())
        if stored != shape:
            raise ValueError(
                f"{self._folder} holds no tensor {name} of shape {tuple(shape)}: export the model "
                "again."
            )

    def read(self, name: str) -> Tensor:
        """The whole parameter ``name``, on the CPU."""
        with safe_open(self._files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor


def read_mask(folder: Path, name: str) -> Tensor:
    """The mask in an export of the prunable parameter ``name``: bool of its shape, on the CPU.

    It says which weights were kept. The files are read as they are: ``verify_export`` finds what is
    damaged. Raises ValueError if the folder has no mask of that name, or one of another size.
    """
    masks, weights = find_tensors(folder, "masks"), find_tensors(folder)
    if name not in masks or name not in weights:
        raise ValueError(f"{folder} holds no mask of {name}: name a prunable parameter.")
    with safe_open(weights[name], framework="pt") as tensors:
        shape = tuple(tensors.get_slice(name).get_shape())
    with safe_open(masks[name], framework="pt") as tensors:
        bits: Tensor = tensors.get_tensor(name)
    if (bits.dtype, tuple(bits.shape)) != (torch.uint8, (-(-math.prod(shape) // 8),)):
        raise ValueError(
            f"{folder} holds a mask of {name} that is not of its size: export it again."
        )
    return PackedMask(bits, shape).unpack()


def _listed_tensors(folder: Path) -> dict[str, Path]:
    """As ``find_tensors``. Raises ValueError for a file that compression.json does not list."""
    files = find_tensors(folder)
    facts = read_record(folder)
    for file in dict.fromkeys(files.values()):
        if not lists(facts, file.name):
            raise ValueError(f"{file} is not listed in {FACTS}: remove it.")
    return files


def _again(damage: Damaged) -> ValueError:
    """What is damaged, with what to do about an export."""
    return ValueError(f"{damage.fact}: copy the folder again, or compress the checkpoint again.")


def _not_ours(folder: Path) -> ValueError:
    return ValueError(f"{folder / FACTS} was not written by qsdp compress: export the model again.")
