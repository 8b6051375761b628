"""A model filled from safetensors, each rank with its slices alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from qsdp.common.atomic_files import is_file_name
from qsdp.common.sharding import local_slices
from qsdp.common.user_errors import quoted
from qsdp.compat.parameter_names import named_parameters


@torch.no_grad()
def fill(
    model: nn.Module,
    folder: str | Path,
    files: Mapping[str, Path],
    stored: Callable[[str], tuple[str, bool]],
) -> None:
    """Fill a model in place, plain or sharded by FSDP2, from safetensors; each rank its slices.

    Args:
        model: Its parameters are filled.
        folder: What messages name.
        files: As ``find_tensors`` returns it.
        stored: Gives the tensor's name of a parameter's, and whether it is kept transposed.

    Raises:
        ValueError: A tensor is missing or of another shape than the model's.
    """
    for name, parameter in named_parameters(model).items():
        their_name, transposed = stored(name)
        if their_name not in files:
            raise ValueError(
                f"{folder} holds no tensor for parameter {name}: choose a complete "
                "checkpoint, and build the model from its config."
            )
        shape, slices = list(parameter.shape), list(local_slices(parameter))
        if transposed:
            shape.reverse()
            slices.reverse()
        with safe_open(files[their_name], framework="pt") as tensors:
            tensor = tensors.get_slice(their_name)
            if list(tensor.get_shape()) != shape:
                raise ValueError(
                    f"tensor {their_name} in {folder} has shape {list(tensor.get_shape())}, but "
                    f"the model needs {shape}: build the model from this checkpoint's config."
                )
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if local.numel():
                values = tensor[tuple(slices)]
                local.copy_(values.t() if transposed else values)


def find_tensors(folder: Path, stem: str = "model") -> dict[str, Path]:
    """The safetensors file that holds each tensor of a checkpoint, which may be several files.

    Where there is one file with all of them it is read, as transformers does, whatever an index
    beside it says. Raises ValueError for a file that is missing or not readable.
    """
    index, whole = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists() and not whole.exists():
        weight_map = read_json_beside(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map of files: copy or save it again.")
        for file in weight_map.values():
            if not is_file_name(file):
                raise ValueError(
                    f"{index} names {str(file)[:100]!r}, which is not the name of a file beside "
                    "it, and is refused: choose another checkpoint."
                )
        files = {folder / file for file in weight_map.values()}
    else:
        files = {whole}
    found: dict[str, Path] = {}
    for file in sorted(files):
        if not file.is_file():
            raise ValueError(
                f"there is no {file}: choose a checkpoint saved as safetensors (in transformers, "
                "model.save_pretrained(folder))."
            )
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is no readable safetensors file ({quoted(error)}): copy or save it again."
            ) from None
    return found


def read_json_beside(path: Path) -> dict[str, Any]:
    """The JSON object in a file that lies beside safetensors: their index, or config.json.

    Raises ValueError if there is none, or none that can be read.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}: choose the folder of a Hugging Face checkpoint.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not readable JSON ({quoted(error)}): copy or save it again."
        ) from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object: copy or save it again.")
    return settings
