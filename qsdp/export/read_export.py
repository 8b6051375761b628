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
                       source's path and step, the model's size, the run's settings
tokenizer.json         the run's tokenizer, if it has one
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qsdp.common.bitmask import PackedMask
from qsdp.common.user_errors import quoted
from qsdp.models.load_safetensors import fill, find_tensors

FACTS = "compression.json"
TOKENIZER = "tokenizer.json"
FORMAT = "qsdp-compressed-1"
MASKS_FORMAT = "qsdp-masks-1"


def read_facts(folder: Path) -> dict[str, Any]:
    """What compression.json of an export says.

    Raises ValueError if it cannot be read or is another file's.
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({quoted(error)}): export the model again."
        ) from None
    parts = {"model": dict, "config": dict, "source": dict, "target": str}
    is_whole = isinstance(facts, dict) and facts.get("format") == FORMAT
    if is_whole and "method" in facts:
        parts["method"] = str
    if not is_whole or not all(isinstance(facts.get(n), kind) for n, kind in parts.items()):
        raise ValueError(f"{path} was not written by qsdp compress: export the model again.")
    return facts


def load_export(folder: Path, model: nn.Module) -> None:
    """Fill ``model`` from an export, in place, plain or sharded by FSDP2.

    Each rank reads its slices alone. Raises ValueError for a tensor that is missing or of another
    shape.
    """
    fill(model, folder, find_tensors(folder), lambda name: (name, False))


class ExportReader:
    """Reads an export tensor by tensor, as ``checkpoint.TensorReader`` reads a checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a file that is missing or not readable."""
        self._folder = folder
        self._files = find_tensors(folder)

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

    It says which weights were kept. Raises ValueError if the folder has no mask of that name, or
    one of another size.
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
