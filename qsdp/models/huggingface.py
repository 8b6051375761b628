"""Hugging Face GPT-2 checkpoints: read into our GPT, written from it.

Hugging Face keeps GPT-2's linears as Conv1D, [in, out]; ours are nn.Linear, [out, in].
Only safetensors is needed: the transformers library is not imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qsdp.common.files import is_file_name, new_folder, replacing, write_text
from qsdp.common.meeting import meet, mistakes_shared
from qsdp.compat import full_tensor, named_parameters
from qsdp.models.gpt import GPT, GPTConfig, local_slices

_WEIGHTS = "model.safetensors"
_PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_BLOCK_MODULES = {
    "norm_attn": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "norm_mlp": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_ROOT_MODULES = {
    "embed": "transformer.wte",
    "position": "transformer.wpe",
    "norm_out": "transformer.ln_f",
    "head": "lm_head",
}
# Settings that change the function which a checkpoint's weights compute, with the only values
# that our GPT computes. The first value is the one that Hugging Face assumes when it is absent.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def config_from_huggingface(folder: str | Path) -> GPTConfig:
    """The GPTConfig of the GPT-2 checkpoint in `folder` (dropout 0, whatever it was trained with).

    Raises ValueError when `folder` has no readable config.json, or one that is not a GPT-2 whose
    function our GPT computes.
    """
    path = Path(folder) / "config.json"
    settings = _read_json(path)
    if settings.get("model_type") != "gpt2":
        raise ValueError(
            f"{path} describes a model of type {settings.get('model_type')!r}, but only 'gpt2' "
            "can be loaded: choose a GPT-2 checkpoint."
        )
    for name, allowed in _SUPPORTED.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path} sets {name} to {settings[name]!r}, but only {list(allowed)} can be "
                "loaded: choose another checkpoint."
            )
    try:
        width = settings["n_embd"]
        config = GPTConfig(
            vocab_size=settings["vocab_size"],
            num_layers=settings["n_layer"],
            num_heads=settings["n_head"],
            width=width,
            context=settings["n_positions"],
            tie_weights=settings.get("tie_word_embeddings", True),
        )
    except KeyError as error:
        raise ValueError(
            f"{path} lacks the setting {error}: choose a complete GPT-2 checkpoint."
        ) from None
    if settings.get("n_inner") not in (None, 4 * width):
        raise ValueError(
            f"{path} sets n_inner to {settings['n_inner']}, but only 4 n_embd = {4 * width} can "
            "be loaded: choose another checkpoint."
        )
    return config


def load_huggingface(folder: str | Path) -> GPT:
    """A plain fp32 GPT on the CPU with the weights of the GPT-2 checkpoint in `folder`.

    Raises ValueError as `config_from_huggingface` and `load_huggingface_weights` do.
    """
    with torch.device("meta"):
        model = GPT(config_from_huggingface(folder))
    model.to_empty(device="cpu")
    load_huggingface_weights(model, folder)
    return model


@torch.no_grad()
def load_huggingface_weights(model: nn.Module, folder: str | Path) -> None:
    """Fill a GPT in place, plain or sharded by FSDP2, with the GPT-2 checkpoint in `folder`.

    Every rank reads only its own slices. `model` must be built from `config_from_huggingface`.
    Raises ValueError for a missing or unreadable file, and for a tensor that is missing or of
    another shape than the model's.
    """
    files = find_tensors(Path(folder))

    def stored(name: str) -> tuple[str, bool]:
        their_name, transposed = _their_name(name)
        # Checkpoints saved from the bare GPT2Model, openai-community/gpt2 for one, have no prefix.
        bare_name = their_name.removeprefix("transformer.")
        return bare_name if their_name not in files else their_name, transposed

    fill(model, folder, files, stored)


@torch.no_grad()
def fill(
    model: nn.Module,
    folder: str | Path,
    files: Mapping[str, Path],
    stored: Callable[[str], tuple[str, bool]],
) -> None:
    """Fill a model in place, plain or sharded by FSDP2, from safetensors; each rank its slices.

    Args:
        model: whose parameters to fill.
        folder: what messages name.
        files: as `find_tensors` returns it.
        stored: of a parameter's name, the tensor's, and whether it is kept transposed.

    Raises: ValueError for a tensor that is missing or of another shape than the model's.
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
                    f"Tensor {their_name} in {folder} has shape {list(tensor.get_shape())}, but "
                    f"the model needs {shape}: build the model from this checkpoint's config."
                )
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if local.numel():
                values = tensor[tuple(slices)]
                local.copy_(values.t() if transposed else values)


@torch.no_grad()
def export_huggingface(
    model: GPT, folder: str | Path, *, files: Mapping[str, str] | None = None
) -> None:
    """Write `model` to `folder` so that transformers' GPT2LMHeadModel.from_pretrained loads it.

    Writes config.json and model.safetensors in the parameters' dtype. A model without biases gets
    zero ones, which compute the same. Under FSDP2 every rank calls this: each parameter is gathered
    in full precision, one at a time, and rank 0 keeps it and writes.

    A new folder appears when it is complete. In one that holds a model of the same configuration
    the weights are replaced in one instant, and the parts that an old one lay in are deleted then.

    Args:
        model: Whose parameters to write.
        folder: To be made, empty, or of a model of the same configuration.
        files: Further texts to write, by file name: the tokenizer.json of the model's tokenizer.

    Raises: ValueError when `folder` holds anything else, or cannot be written; RuntimeError on the
        other ranks then.
    """
    path = Path(folder)
    world = [dist.group.WORLD] if dist.group.WORLD is not None else []
    with mistakes_shared("export_huggingface", world):
        _check_files(path, files or {})
        is_there = _is_there(path, model.config)
    meet("export_huggingface", {}, world)
    writes = not world or dist.get_rank() == 0
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model).items():
        full = full_tensor(parameter) if isinstance(parameter, DTensor) else parameter
        if writes:
            their_name, transposed = _their_name(name)
            # A copy: safetensors wants tensors that are contiguous and share no storage.
            tensors[their_name] = (
                (full.t() if transposed else full)
                .cpu()
                .clone(memory_format=torch.contiguous_format)
            )
    if not model.config.bias:
        _add_zero_biases(tensors)
    with mistakes_shared("export_huggingface", world):
        if writes:
            _write(path, model.config, tensors, files or {}, is_there)
    meet("export_huggingface", {}, world)


def _check_files(path: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        is_ours = name in (_WEIGHTS, f"{_WEIGHTS}.index.json", "config.json")
        if not is_file_name(name) or is_ours or _PART.fullmatch(name) or (path / name).is_dir():
            raise ValueError(f"files holds {name!r}: give names of files that stand beside these.")
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise ValueError(f"files holds no text for {name} ({error}): give one.") from None


def _is_there(path: Path, config: GPTConfig) -> bool:
    """Whether `path` holds a model of this configuration. Raises ValueError for anything else."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder to export to.")
    if not path.is_dir() or not any(path.iterdir()):
        return False
    try:
        is_alike = _size_of(config_from_huggingface(path)) == _size_of(config)
    except ValueError:
        is_alike = False
    if not is_alike:
        raise ValueError(
            f"{path} holds something else than a model of this configuration: choose a new folder "
            "to export to."
        )
    return True


def _size_of(config: GPTConfig) -> dict[str, Any]:
    return _their_config(replace(config, dropout=0.0))


def _write(
    path: Path,
    config: GPTConfig,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, str],
    is_there: bool,
) -> None:
    try:
        with nullcontext(path) if is_there else new_folder(path) as inside:
            with replacing(inside / _WEIGHTS) as temporary:
                save_file(dict(tensors), temporary, metadata={"format": "pt"})
            if not is_there:
                write_text(
                    inside / "config.json", json.dumps(_their_config(config), indent=2) + "\n"
                )
            for name, text in files.items():
                write_text(inside / name, text)
            _remove_parts(inside)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be written ({error}): free some space there, or choose another folder."
        ) from None


def _remove_parts(folder: Path) -> None:
    """Delete the parts that the weights lay in before: whoever reads takes the whole file first."""
    index = folder / f"{_WEIGHTS}.index.json"
    if index.is_file():
        for part in folder.iterdir():
            if _PART.fullmatch(part.name):
                part.unlink()
        index.unlink()  # last: who is killed before this finds the rest by it the next time


def _their_name(name: str) -> tuple[str, bool]:
    """Our parameter name -> (theirs, whether theirs is transposed)."""
    module, _, kind = name.rpartition(".")
    if module in _ROOT_MODULES:
        return f"{_ROOT_MODULES[module]}.{kind}", False
    _, index, inner = module.split(".", 2)
    transposed = kind == "weight" and not inner.startswith("norm")
    return f"transformer.h.{index}.{_BLOCK_MODULES[inner]}.{kind}", transposed


def _add_zero_biases(tensors: dict[str, Tensor]) -> None:
    for name, weight in list(tensors.items()):
        if name.startswith(("transformer.h.", "transformer.ln_f.")):
            bias_name = name.removesuffix("weight") + "bias"
            tensors[bias_name] = weight.new_zeros(weight.shape[-1])


def _their_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.width,
        "n_positions": config.context,
        "n_inner": None,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_weights,
        # GPT-2's end-of-text token is the last of its vocabulary. Hugging Face's default, 50256,
        # would lie outside a smaller one.
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        **{name: allowed[0] for name, allowed in _SUPPORTED.items()},
    }


def find_tensors(folder: Path, stem: str = "model") -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, of a checkpoint in one or more files.

    Where there is one file with all of them it is read, as transformers does, whatever an index
    beside it says. Raises ValueError for a file that is missing or not readable.
    """
    index, whole = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists() and not whole.exists():
        weight_map = _read_json(index).get("weight_map")
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
                f"There is no {file}: choose a checkpoint saved as safetensors (in transformers, "
                "model.save_pretrained(folder))."
            )
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is no readable safetensors file ({error}): copy or save it again."
            ) from None
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no {path}: choose the folder of a Hugging Face checkpoint.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): copy or save it again.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object: copy or save it again.")
    return settings
