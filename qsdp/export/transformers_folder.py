"""From a checkpoint or a compressed export to a folder that the transformers library loads.

config.json            with the dtype, and with the tokenizer's end of a text as end of a sequence
model.safetensors      the tensors under the library's names; in several files as an export's
tokenizer.json         and tokenizer_config.json: see ``qsdp.data.transformers_tokenizer``
qsdp_compression.json  an export's compression.json. Under its own name it would say that the
                       tensors have our names, and masks beside them
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsdp.checkpoint import TensorReader, lists, read_meta
from qsdp.common.atomic_files import atomic_folder
from qsdp.data.tokenizer import Tokenizer, tokenizer_from_json
from qsdp.data.transformers_tokenizer import end_of_text, tokenizer_files
from qsdp.export.checked_reader import checked_reader
from qsdp.export.counted_bytes import CountedBytes, Progress
from qsdp.export.read_export import (
    CHECKSUMS,
    FACTS,
    TOKENIZER,
    ExportReader,
    read_record,
)
from qsdp.export.tensor_files import TensorFiles
from qsdp.models.registry import family_of_size, form_of_size
from qsdp.models.size import ModelSize
from qsdp.models.transformers_form import TransformersForm

RECORD = f"qsdp_{FACTS}"


@torch.no_grad()
def export_transformers(
    source: Path,
    size: ModelSize,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = 2 << 30,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Write the model of ``source`` into the new folder ``out``, for the transformers library.

    What is written equals the export of the whole model in memory, bit for bit. In memory there is
    one tensor at a time, with a few copies of it: not the model. A folder that is there is whole:
    see ``atomic_folder``.

    Args:
        source: A checkpoint's folder step-..., written by any number of ranks, or an export's.
        size: The size of the model in it.
        out: The folder to make; it must not exist, or be empty.
        dtype: Of all tensors: fp32, bf16 or fp16. None is the stored one, the widest if there are
            several.
        file_bytes: The most bytes of tensors in one file.
        progress: Called with the bytes read so far, and those to read in all.

    Returns:
        What config.json holds.

    Raises:
        ValueError: ``source`` is damaged or of another model, the library has no such model,
            ``dtype`` is none of weights or cannot hold one, or ``out`` is in use.
    """
    if file_bytes < 1:
        raise ValueError(f"file_bytes is {file_bytes}: choose 1 or more.")
    form = form_of_size(size)
    with torch.device("meta"):
        model = family_of_size(size).build(size)
    parameters = dict(model.named_parameters())
    is_compressed = (source / FACTS).is_file()
    meta = read_record(source) if is_compressed else read_meta(source)
    with atomic_folder(out) as folder:
        num_bytes = sum(parameter.nbytes for parameter in parameters.values())
        files = [source / name for name in meta.get(CHECKSUMS, ())]
        counted = CountedBytes(progress, num_bytes, files)
        reader = checked_reader(source, model, dtype, counted.add)
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        chosen = dtype or reduce(torch.promote_types, map(reader.dtype, shapes))
        settings = form.settings(size)
        # Older versions of the library know the second name alone.
        settings |= dict.fromkeys(("dtype", "torch_dtype"), str(chosen).removeprefix("torch."))
        texts = {}
        if (tokenizer := _tokenizer_of(source, meta)) is not None:
            # Where texts follow each other, what ends one comes before the next.
            settings |= dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text(tokenizer))
            texts = tokenizer_files(tokenizer, size.context)
        texts["config.json"] = json.dumps(settings, indent=2) + "\n"
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        if is_compressed:
            shutil.copyfile(source / FACTS, folder / RECORD)
        _write(folder, reader, form, size, shapes, chosen, file_bytes, counted)
    return settings


def _write(
    folder: Path,
    reader: TensorReader | ExportReader,
    form: TransformersForm[Any],
    size: ModelSize,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    file_bytes: int,
    counted: CountedBytes,
) -> None:
    """Write the weights of our parameters of these shapes, and what the library needs besides."""
    theirs = {name: form.tensor_name(name) for name in shapes}
    stored = {
        their_name: tuple(reversed(shapes[name]) if transposed else shapes[name])
        for name, (their_name, transposed) in theirs.items()
    }
    zeros = form.zero_tensors(size, stored)
    kinds = {name: (dtype, shape) for name, shape in {**stored, **zeros}.items()}
    weights = TensorFiles(folder, "model", kinds, file_bytes)
    try:
        for name, (their_name, transposed) in theirs.items():
            tensor = reader.read(name)
            counted.add(tensor.nbytes)
            tensor = _cast(name, tensor, dtype)
            weights.write(their_name, tensor.t() if transposed else tensor)
            del tensor  # before the next one is read
        for name, shape in zeros.items():
            weights.write(name, torch.zeros(shape, dtype=dtype))
    finally:
        weights.close()


def _tokenizer_of(source: Path, meta: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer beside the weights, if one was saved there."""
    path = source / TOKENIZER
    if not path.is_file() or not lists(meta, TOKENIZER):
        return None
    return tokenizer_from_json(path.read_text(encoding="utf-8"), str(path))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``. Raises ValueError for a value that it cannot hold."""
    cast = tensor.to(dtype)
    if (cast.isinf() & tensor.isfinite()).any():
        largest = tensor[tensor.isfinite()].abs().max()
        raise ValueError(
            f"{name} has a weight of magnitude {largest:.3g}, which "
            f"{str(dtype).removeprefix('torch.')} cannot hold: choose a dtype of a wider range."
        )
    return cast
