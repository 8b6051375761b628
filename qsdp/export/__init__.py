"""Models on disk: compressed, with masks and how they were made, and as transformers has them."""

from __future__ import annotations

from qsdp.export.compressed_model import export_compressed
from qsdp.export.read_export import (
    FACTS,
    check_export,
    load_export,
    read_facts,
    read_mask,
    verify_export,
)
from qsdp.export.transformers_folder import export_transformers

__all__ = [
    "FACTS",
    "check_export",
    "export_compressed",
    "export_transformers",
    "load_export",
    "read_facts",
    "read_mask",
    "verify_export",
]
