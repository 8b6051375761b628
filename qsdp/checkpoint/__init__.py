"""Checkpoints that are whole or absent."""

from qsdp.checkpoint.folders import (
    latest,
    read_meta,
    remove,
    resolve,
    steps,
    verify,
)
from qsdp.checkpoint.reader import TensorReader
from qsdp.checkpoint.state import load, load_model, save

__all__ = [
    "TensorReader",
    "latest",
    "load",
    "load_model",
    "read_meta",
    "remove",
    "resolve",
    "save",
    "steps",
    "verify",
]
