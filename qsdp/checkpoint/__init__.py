"""Checkpoints that are whole or absent."""

from qsdp.checkpoint.folders import clear_after, latest, read_meta, resolve, sync_folder, verify
from qsdp.checkpoint.reader import TensorReader
from qsdp.checkpoint.state import load, load_model, save

__all__ = [
    "TensorReader",
    "clear_after",
    "latest",
    "load",
    "load_model",
    "read_meta",
    "resolve",
    "save",
    "sync_folder",
    "verify",
]
