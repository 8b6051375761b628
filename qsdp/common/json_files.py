"""JSON that every reader can read, in files that are whole or absent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from qsdp.common.atomic_files import write_text


def write_json(path: Path, value: Any) -> None:
    """Replace the file ``path`` by the JSON of ``value``, all or nothing: see ``json_value``."""
    write_text(path, json.dumps(json_value(value), indent=1, allow_nan=False) + "\n")


def json_value(value: Any) -> Any:
    """``value`` as JSON can hold it: None, its null, for every number that is not finite.

    Tuples become lists, as JSON has them, and NumPy's numbers Python's.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
