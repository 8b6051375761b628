"""A model filled from safetensors, each rank with its slices alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from qsdp.common.atomic_files import is_file_name
from qsdp.common.sharding import local_slices
from qsdp.common.user_errors import names_for_user, quoted
from qsdp.compat.parameter_names import named_parameters

_DTYPES = ("F64", "F32", "BF16", "F16")
"""Of weights, as safetensors has them. Others are codes, which need a scale from elsewhere."""


@torch.no_grad()
def fill(
    model: nn.Module,
    folder: str | Path,
    files: Mapping[str, Path],
    stored: Callable[[str], tuple[str, bool]],
    spare: Iterable[str] = (),
) -> None:
    """Fill a model in place, plain or sharded by FSDP2, from safetensors; each rank its slices.

    Args:
        model: Its parameters are filled.
        folder: What messages name.
        files: As ``find_tensors`` returns it.
        stored: Gives the tensor's name of a parameter's, and whether it is kept transposed.
        spare: Tensors that the model does without.

    Raises:
        ValueError: A tensor is missing, of another shape than the model's or of codes, or would be
            lost.
    """
    parameters = named_parameters(model)
    theirs = {name: stored(name) for name in parameters}
    check_all_is_taken(folder, files, {*spare, *(name for name, _ in theirs.values())})
    for name, parameter in parameters.items():
        their_name, transposed = theirs[name]
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
            if tensor.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"tensor {their_name} in {folder} is of dtype {tensor.get_dtype()}, but "
                    f"weights are {', '.join(_DTYPES)}: choose a model that is not quantized."
                )
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if local.numel():
                values = tensor[tuple(slices)]
                local.copy_(values.t() if transposed else values)


def check_all_is_taken(folder: str | Path, stored: Iterable[str], taken: Collection[str]) -> None:
    """Raise ValueError if ``folder`` has a tensor ``stored`` that is not ``taken``, but lost."""
    if lost := sorted(name for name in stored if name not in taken):
        raise ValueError(
            f"{folder} holds {names_for_user(lost)}, which would be lost, as the model has no such "
            "parameter: build the model that was saved, or copy the folder again."
        )


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
                f"there is no {file}: choose a complete folder of a model saved as safetensors."
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
