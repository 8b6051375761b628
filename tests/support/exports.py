"""Compressed exports that someone has edited: with right checksums, or with none, as older ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qsdp.checkpoint import crc32_of_bytes, sealed
from qsdp.data.tokenizer import ByteTokenizer
from qsdp.export import export_compressed
from qsdp.models.gpt2.config import GPTConfig
from qsdp.sparsity.compression_target import Compression
from tests.support.small_gpt import SIZE, save_model


def small_export(folder: Path, size: GPTConfig = SIZE, **options: Any) -> Path:
    """``folder``/export of ``save_model``'s checkpoint there, half of it pruned."""
    save_model(folder, size, ByteTokenizer().to_json())
    path, out = folder / "checkpoints" / "step-00000007", folder / "export"
    export_compressed(path, size, Compression(sparsity=0.5), out, **options)
    return out


def edit_tensors(export: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Let ``edit`` change the tensors of an export in one file; checksums are those of the new."""
    tensors = load_file(export / "model.safetensors")
    edit(tensors)
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    data = (export / "model.safetensors").read_bytes()

    def state(facts: dict[str, Any]) -> None:
        facts["checksums"]["model.safetensors"] = crc32_of_bytes(data)

    edit_facts(export, state)


def edit_facts(export: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Let ``edit`` change what compression.json says; its checksum is that of the new."""
    path = export / "compression.json"
    facts = json.loads(path.read_text())
    edit(facts)
    path.write_text(sealed(facts))


def make_older(export: Path) -> None:
    """Take the checksums out of compression.json."""
    path = export / "compression.json"
    facts = json.loads(path.read_text())
    del facts["checksums"], facts["checksum"]
    path.write_text(json.dumps(facts, indent=1) + "\n")
