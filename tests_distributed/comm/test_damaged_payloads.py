"""A payload that was damaged on the way is refused."""

from __future__ import annotations

import random
import re

import pytest

from tests_distributed.support.damage import damaged
from tests_distributed.support.running import Run


@pytest.mark.parametrize("direction", ["gather", "reduce"])
def test_a_payload_whose_header_is_damaged_in_one_bit_is_refused(run: Run, direction: str) -> None:
    for _ in range(5):
        byte, bit = random.randrange(32), random.randrange(8)
        for message in run(2, damaged, direction, byte, bit):
            assert re.search(r"rank [01] sent a payload with header .* is expected", message)
