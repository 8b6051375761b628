"""Hugging Face checkpoints of the families that have such a form: read and written.

Only safetensors is needed: the transformers library is not imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qsdp.common.atomic_files import atomic_folder, is_file_name, replacing, write_text
from qsdp.common.rank_agreement import meet, mistakes_shared
from qsdp.common.user_errors import quoted
from qsdp.compat.parameter_names import named_parameters
from qsdp.compat.torch_collectives import full_tensor
from qsdp.models.huggingface.config import config_from_huggingface, form_of
from qsdp.models.language_model import LanguageModel
from qsdp.models.load_safetensors import fill, find_tensors
from qsdp.models.registry import family_of_size, form_of_size
from qsdp.models.size import ModelSize
from qsdp.models.transformers_form import TransformersForm

WEIGHTS = "model.safetensors"
PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def load_huggingface(folder: str | Path) -> LanguageModel:
    """A plain fp32 model on the CPU with the weights of the checkpoint in ``folder``.

    It is a GPT for a GPT-2. Raises ValueError as ``config_from_huggingface`` and
    ``load_huggingface_weights`` do.
    """
    size = config_from_huggingface(folder)
    with torch.device("meta"):
        model = family_of_size(size).build(size)
    model.to_empty(device="cpu")
    load_huggingface_weights(model, folder)
    return model


@torch.no_grad()
def load_huggingface_weights(model: nn.Module, folder: str | Path) -> None:
    """Fill a model in place, plain or sharded by FSDP2, with the checkpoint in ``folder``.

    Every rank reads only its own slices. ``model`` must be built from ``config_from_huggingface``.
    Tensors that change nothing may lie beside the parameters: see ``_spare``.

    Raises ValueError for a missing or unreadable file, for a tensor that is missing, of another
    shape than the model's or of codes, and for one that would be lost.
    """
    size = getattr(model, "config", None)
    form = form_of(Path(folder)) if size is None else form_of_size(size)
    files = find_tensors(Path(folder))

    def stored(name: str) -> tuple[str, bool]:
        their_name, transposed = form.tensor_name(name)
        # Checkpoints saved from the bare model, openai-community/gpt2 for one, have no prefix.
        bare_name = their_name.removeprefix(form.base_prefix)
        return bare_name if their_name not in files else their_name, transposed

    fill(model, folder, files, stored, _spare(model, form, files, stored))


def _spare(
    model: nn.Module,
    form: TransformersForm[Any],
    files: Mapping[str, Path],
    stored: Callable[[str], tuple[str, bool]],
) -> set[str]:
    """The tensors without which the model computes the same.

    These are constants, what equals the weights that it is tied to, and biases of zeros where our
    model has none.
    """
    prefix, size = form.base_prefix, getattr(model, "config", None)
    shapes = {form.tensor_name(n)[0]: tuple(p.shape) for n, p in named_parameters(model).items()}
    zeros = {} if size is None else form.zero_tensors(size, shapes)
    zero_names = {name if name in files else name.removeprefix(prefix) for name in zeros}
    taken = {stored(name)[0] for name in named_parameters(model)}
    spare = set()
    for name in files.keys() - taken:
        tie = form.tied.get(name, "")
        tie = tie if tie in files else tie.removeprefix(prefix)
        if (
            re.fullmatch(form.buffers, name)
            or (name in zero_names and not _read(files, name).any())
            or (tie in files and _are_equal(_read(files, name), _read(files, tie)))
        ):
            spare.add(name)
    return spare


def _read(files: Mapping[str, Path], name: str) -> Tensor:
    with safe_open(files[name], framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@torch.no_grad()
def export_huggingface(
    model: LanguageModel, folder: str | Path, *, files: Mapping[str, str] | None = None
) -> None:
    """Write ``model`` to ``folder`` so that the transformers library loads it.

    A GPT becomes a GPT2LMHeadModel, with zero biases where it has none, which compute the same.
    config.json and model.safetensors are written in the parameters' dtype. Under FSDP2 every rank
    calls this: each parameter is gathered in full precision, one at a time, and rank 0 keeps it and
    writes.

    A new folder appears when it is complete. In one that holds a model of the same configuration
    the weights are replaced in one instant, and the parts that an old one lay in are deleted then.

    Args:
        model: Its parameters are written.
        folder: To be made, empty, or of a model of the same configuration.
        files: Further texts to write, by file name: those of the tokenizer, of which
            ``qsdp.data.transformers_tokenizer`` makes what the library loads.

    Raises:
        ValueError: ``folder`` holds anything else, or cannot be written, or the library has no such
            model.
        RuntimeError: On the other ranks then.
    """
    path = Path(folder)
    world = [dist.group.WORLD] if dist.group.WORLD is not None else []
    with mistakes_shared("export_huggingface", world):
        _check_texts(path, files or {})
        form = form_of_size(model.config)
        is_there = _is_there(path, form, model.config)
    meet("export_huggingface", {}, world)
    writes = not world or dist.get_rank() == 0
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model).items():
        full = full_tensor(parameter) if isinstance(parameter, DTensor) else parameter
        if writes:
            their_name, transposed = form.tensor_name(name)
            # A copy: safetensors wants tensors that are contiguous and share no storage.
            tensors[their_name] = (
                (full.t() if transposed else full)
                .cpu()
                .clone(memory_format=torch.contiguous_format)
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, shape in form.zero_tensors(model.config, shapes).items():
        tensors[name] = torch.zeros(shape, dtype=next(iter(tensors.values())).dtype)
    with mistakes_shared("export_huggingface", world):
        if writes:
            _write_checkpoint(path, form.settings(model.config), tensors, files or {}, is_there)
    meet("export_huggingface", {}, world)


def _check_texts(path: Path, files: Mapping[str, str]) -> None:
    """Raise ValueError unless ``files`` are texts that may stand beside the weights."""
    for name, text in files.items():
        is_ours = name in (WEIGHTS, f"{WEIGHTS}.index.json", "config.json")
        if not is_file_name(name) or is_ours or PART.fullmatch(name) or (path / name).is_dir():
            raise ValueError(f"files holds {name!r}: give names of files that stand beside these.")
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise ValueError(
                f"files holds no text for {name} ({quoted(error)}): give one."
            ) from None


def _is_there(path: Path, form: TransformersForm[Any], size: ModelSize) -> bool:
    """Whether ``path`` holds a model of this configuration. Raises ValueError for anything else."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder to export to.")
    if not path.is_dir() or not any(path.iterdir()):
        return False
    try:
        # What config.json has no room for, ours may have.
        is_alike = config_from_huggingface(path) == form.size(form.settings(size), path)
    except ValueError:
        is_alike = False
    if not is_alike:
        raise ValueError(
            f"{path} holds something else than a model of this configuration: choose a new folder "
            "to export to."
        )
    return True


def _write_checkpoint(
    path: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, str],
    is_there: bool,
) -> None:
    try:
        with nullcontext(path) if is_there else atomic_folder(path) as inside:
            with replacing(inside / WEIGHTS) as temporary:
                save_file(dict(tensors), temporary, metadata={"format": "pt"})
            if not is_there:
                write_text(inside / "config.json", json.dumps(settings, indent=2) + "\n")
            for name, text in files.items():
                write_text(inside / name, text)
            _remove_parts(inside)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be written ({quoted(error)}): free some space there, or choose another "
            "folder."
        ) from None


def _remove_parts(folder: Path) -> None:
    """Delete the parts that the weights lay in before: readers take the whole file first."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        for part in folder.iterdir():
            if PART.fullmatch(part.name):
                part.unlink()
        index.unlink()  # last: who is killed before this finds the rest by it the next time
