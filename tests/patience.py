"""How long tests wait for what must come: a slow or busy machine is no fault."""

from __future__ import annotations

import os


def seconds(base: float = 300.0) -> float:
    """`base` times the environment variable QSDP_TEST_PATIENCE, which is 1 unless set.

    For every wait that is not itself what a test is about.
    """
    return base * float(os.environ.get("QSDP_TEST_PATIENCE", "1"))
