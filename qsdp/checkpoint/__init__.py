"""Checkpoints that are whole or absent."""

from qsdp.checkpoint.folders import clear_after, latest, read_meta, resolve
from qsdp.checkpoint.state import load, save

__all__ = ["clear_after", "latest", "load", "read_meta", "resolve", "save"]
