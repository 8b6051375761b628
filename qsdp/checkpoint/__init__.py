"""Checkpoints that are whole or absent."""

from __future__ import annotations

from qsdp.checkpoint.background import AsyncSaver
from qsdp.checkpoint.damaged import Damaged
from qsdp.checkpoint.folders import latest, remove, resolve, step_of, steps
from qsdp.checkpoint.loading import load, load_model, load_tensors
from qsdp.checkpoint.meta_json import lists, read_meta
from qsdp.checkpoint.saving import save
from qsdp.checkpoint.tensor_reader import TensorReader
from qsdp.checkpoint.verifying import check, verify

__all__ = [
    "AsyncSaver",
    "Damaged",
    "TensorReader",
    "check",
    "latest",
    "lists",
    "load",
    "load_model",
    "load_tensors",
    "read_meta",
    "remove",
    "resolve",
    "save",
    "step_of",
    "steps",
    "verify",
]
