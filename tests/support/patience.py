"""How long a test waits for what may be slow: generous, since a slow machine is no fault."""

from __future__ import annotations

import os

VARIABLE = "QSDP_TEST_PATIENCE"


def seconds(base: float = 300.0) -> float:
    """``base`` seconds, times the factor in QSDP_TEST_PATIENCE (default 1).

    Raises:
        ValueError: The variable is not a number above 0.
    """
    text = os.environ.get(VARIABLE, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise ValueError(f"{VARIABLE} is {text!r}: give a number above 0, such as 4")
    return base * factor
