"""The last step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), for whoever chains it.

Each of its users has a chaining of its own: keys of payloads (``codec.random_numbers``), seeds of
steps (``methods.cram``), windows of text (``data.batches``).
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""The odd number nearest to 2**64 over the golden ratio, by which SplitMix64 counts."""
MASK = (1 << 64) - 1

Bits = TypeVar("Bits", int, npt.NDArray[np.uint64])


def finalize(bits: Bits) -> Bits:
    """A bijection of 64 bits whose output looks random; of a uint64 array value by value."""
    x: Any = bits
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31
