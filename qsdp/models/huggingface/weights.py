"""Hugging Face GPT-2 checkpoints: read into our GPT, written from it.

Hugging Face keeps GPT-2's linears as Conv1D, [in, out]; ours are nn.Linear, [out, in].
Only safetensors is needed: the transformers library is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qsdp.common.atomic_files import new_folder, replacing, write_text
from qsdp.common.rank_agreement import meet, mistakes_shared
from qsdp.compat.collectives import full_tensor
from qsdp.compat.parameter_names import named_parameters
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.model import GPT
from qsdp.models.huggingface.config import config_from_huggingface, size_of, their_config
from qsdp.models.load_safetensors import PART, WEIGHTS, check_files, fill, find_tensors

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
        check_files(path, files or {})
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


def _is_there(path: Path, config: GPTConfig) -> bool:
    """Whether `path` holds a model of this configuration. Raises ValueError for anything else."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder to export to.")
    if not path.is_dir() or not any(path.iterdir()):
        return False
    try:
        is_alike = size_of(config_from_huggingface(path)) == size_of(config)
    except ValueError:
        is_alike = False
    if not is_alike:
        raise ValueError(
            f"{path} holds something else than a model of this configuration: choose a new folder "
            "to export to."
        )
    return True


def _write(
    path: Path,
    config: GPTConfig,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, str],
    is_there: bool,
) -> None:
    try:
        with nullcontext(path) if is_there else new_folder(path) as inside:
            with replacing(inside / WEIGHTS) as temporary:
                save_file(dict(tensors), temporary, metadata={"format": "pt"})
            if not is_there:
                write_text(
                    inside / "config.json", json.dumps(their_config(config), indent=2) + "\n"
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
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        for part in folder.iterdir():
            if PART.fullmatch(part.name):
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
