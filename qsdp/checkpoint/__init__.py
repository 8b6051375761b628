"""Checkpoints that are whole or absent."""

from qsdp.checkpoint.folders import (
    aside,
    latest,
    read_meta,
    remove_aside,
    resolve,
    restore_aside,
    set_aside,
    verify,
)
from qsdp.checkpoint.reader import TensorReader
from qsdp.checkpoint.state import load, load_model, save

__all__ = [
    "TensorReader",
    "aside",
    "latest",
    "load",
    "load_model",
    "read_meta",
    "remove_aside",
    "resolve",
    "restore_aside",
    "save",
    "set_aside",
    "verify",
]
