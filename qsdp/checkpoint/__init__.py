"""Checkpoints that are whole or absent."""

from __future__ import annotations

from qsdp.checkpoint.background import AsyncSaver
from qsdp.checkpoint.folders import (
    Damaged,
    latest,
    lists,
    read_meta,
    remove,
    resolve,
    step_of,
    steps,
    verify,
)
from qsdp.checkpoint.reader import TensorReader
from qsdp.checkpoint.saving import save
from qsdp.checkpoint.state import check, load, load_model

__all__ = [
    "AsyncSaver",
    "Damaged",
    "TensorReader",
    "check",
    "latest",
    "lists",
    "load",
    "load_model",
    "read_meta",
    "remove",
    "resolve",
    "save",
    "step_of",
    "steps",
    "verify",
]
