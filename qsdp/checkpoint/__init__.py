"""Checkpoints that are whole or absent."""

from __future__ import annotations

from qsdp.checkpoint.background import AsyncSaver
from qsdp.checkpoint.crc32 import Crc32, crc32_of_bytes
from qsdp.checkpoint.damaged import Damaged
from qsdp.checkpoint.folders import latest, remove, resolve, step_of, steps
from qsdp.checkpoint.loading import load, load_model, load_tensors
from qsdp.checkpoint.meta_json import OWN_CHECKSUM, lists, read_meta, sealed
from qsdp.checkpoint.saving import save
from qsdp.checkpoint.tensor_reader import TensorReader
from qsdp.checkpoint.verifying import check, on_all_ranks, verify, verify_files

__all__ = [
    "OWN_CHECKSUM",
    "AsyncSaver",
    "Crc32",
    "Damaged",
    "TensorReader",
    "check",
    "crc32_of_bytes",
    "latest",
    "lists",
    "load",
    "load_model",
    "load_tensors",
    "on_all_ranks",
    "read_meta",
    "remove",
    "resolve",
    "save",
    "sealed",
    "step_of",
    "steps",
    "verify",
    "verify_files",
]
