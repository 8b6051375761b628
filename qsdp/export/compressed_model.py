"""From a training checkpoint to a folder that holds the compressed model, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsdp.checkpoint import TensorReader, crc32_of_bytes, lists, read_meta, sealed
from qsdp.common.atomic_files import atomic_folder
from qsdp.data.tokenizer import hash_of
from qsdp.export.checked_reader import checked_reader
from qsdp.export.counted_bytes import CountedBytes, Progress
from qsdp.export.read_export import CHECKSUMS, FACTS, FORMAT, MASKS_FORMAT, TOKENIZER, ExportReader
from qsdp.export.tensor_files import TensorFiles
from qsdp.models.language_model import LanguageModel
from qsdp.models.registry import family_of_size
from qsdp.models.size import ModelSize
from qsdp.oneshot.registry import DEFAULT, solver_of
from qsdp.oneshot.solver import Solver
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.prunable import Prunable
from qsdp.sparsity.streaming import StoredTensor


def export_compressed(
    checkpoint: Path,
    size: ModelSize,
    target: Compression,
    out: Path,
    *,
    patterns: Sequence[str] | None = None,
    method: str = DEFAULT,
    file_bytes: int = 2 << 30,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Compress the model of ``checkpoint`` in one shot, written into the new folder ``out``.

    What is written equals ``oneshot.compress_`` on the whole model, bit for bit. In memory there is
    one tensor at a time, with its masks and a few copies of it: not the model. A folder that is
    there is whole: see ``atomic_folder``.

    Args:
        checkpoint: A folder step-..., written by any number of ranks.
        size: The size of the model in it.
        target: What to compress to.
        out: The folder to make; it must not exist, or be empty.
        patterns: The prunable set, as in ``prunable_parameters``.
        method: A name in ``oneshot.registry``, of a solver that needs no calibration tokens.
        file_bytes: The most bytes of tensors in one file.
        progress: Called with the bytes read so far, and those to read in all.

    Returns:
        What compression.json holds.

    Raises:
        ValueError: A checkpoint is damaged or of another model, a parameter cannot have the target,
            a method cannot be, or ``out`` is in use.
    """
    if file_bytes < 1:
        raise ValueError(f"file_bytes is {file_bytes}: choose 1 or more.")
    solver = solver_of(method)
    meta = read_meta(checkpoint)
    with torch.device("meta"):
        model = family_of_size(size).build(size)
    prunable = Prunable.of(model, patterns)
    prunable.check(target)
    with atomic_folder(out) as folder:
        num_bytes = _read_bytes(model, prunable, solver.num_reads(target))
        counted = CountedBytes(
            progress, num_bytes, [checkpoint / name for name in meta["checksums"]]
        )
        reader = checked_reader(checkpoint, model, None, counted.add)
        zeros, checksums = _write(
            folder, reader, model, prunable, target, solver, file_bytes, counted
        )
        tokenizer = None
        if lists(meta, TOKENIZER) and (checkpoint / TOKENIZER).is_file():
            shutil.copyfile(checkpoint / TOKENIZER, folder / TOKENIZER)
            tokenizer = hash_of((folder / TOKENIZER).read_text(encoding="utf-8"))
            checksums[TOKENIZER] = crc32_of_bytes((folder / TOKENIZER).read_bytes())
        facts = {
            "format": FORMAT,
            "target": str(target),
            "method": method,
            "prunable_patterns": None if patterns is None else list(patterns),
            "zeros": _count_zeros(zeros, set(prunable.names)),
            "source": {
                "path": str(checkpoint.resolve()),
                "step": meta["step"],
                "world_size": meta.get("world_size"),
            },
            "model": asdict(size),
            "config": meta.get("config"),
            "tokenizer": tokenizer,
            CHECKSUMS: checksums,
        }
        text_of_facts = sealed(facts)
        (folder / FACTS).write_text(text_of_facts, encoding="utf-8")
    written: dict[str, Any] = json.loads(text_of_facts)
    return written


def _write(
    folder: Path,
    reader: TensorReader | ExportReader,
    model: LanguageModel,
    prunable: Prunable,
    target: Compression,
    solver: Solver,
    file_bytes: int,
    counted: CountedBytes,
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Write weights and masks.

    Returns (zeros, values) of each parameter, and the checksum of each file, by name.
    """

    def read(name: str) -> Tensor:
        tensor = reader.read(name)
        counted.add(tensor.nbytes)
        return tensor

    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    kinds = {name: (reader.dtype(name), shape) for name, shape in shapes.items()}
    mask_kinds = {
        name: (torch.uint8, (-(-parameter.numel() // 8),))
        for name, parameter in zip(prunable.names, prunable.parameters, strict=True)
    }
    stored = [
        StoredTensor(partial(read, name), *kinds[name][::-1], dim)
        for name, dim in zip(prunable.names, prunable.dims, strict=True)
    ]
    weights = TensorFiles(folder, "model", kinds, file_bytes)
    masks = TensorFiles(folder, "masks", mask_kinds, file_bytes, MASKS_FORMAT)
    compressed = solver.compress_stream(stored, target)
    zeros = {}
    try:
        for name in kinds:
            if name in mask_kinds:
                tensor, mask = next(compressed)
                masks.write(name, mask.bits)
            else:
                tensor = read(name)
            weights.write(name, tensor)
            zeros[name] = (tensor.numel() - int(tensor.count_nonzero()), tensor.numel())
            del tensor  # before the next one is read
    finally:
        weights.close()
        masks.close()
    return zeros, weights.checksums | masks.checksums


def _count_zeros(zeros: dict[str, tuple[int, int]], prunable: set[str]) -> dict[str, Any]:
    def total(names: Sequence[str]) -> dict[str, int]:
        return {
            "zeros": sum(zeros[name][0] for name in names),
            "values": sum(zeros[name][1] for name in names),
        }

    return {
        "prunable": total([name for name in zeros if name in prunable]),
        "model": total(list(zeros)),
        "tensors": {name: total([name]) for name in zeros},
    }


def _read_bytes(model: LanguageModel, prunable: Prunable, num_reads: int) -> int:
    """How many bytes will be read, without the further reads where ties are cut."""
    once = sum(parameter.nbytes for parameter in model.parameters())
    again = sum(parameter.nbytes for parameter in prunable.parameters)
    return once + (num_reads - 1) * again
