"""Compressed models on disk: dense safetensors with exact zeros, masks, and how they were made."""

from __future__ import annotations

from qsdp.export.compressed_model import export_compressed
from qsdp.export.read_export import FACTS, load_export, read_facts, read_mask

__all__ = ["FACTS", "export_compressed", "load_export", "read_facts", "read_mask"]
