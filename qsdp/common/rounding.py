"""How values are rounded to codes: each rounding with what all that serve it must know of it.

What it does to a value stands in ``qsdp/ops/reference/codec.py``, with the words in [Note: Grid].
There is no torch here: ``qsdp/config.py`` names its roundings by this, and command lines read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum


class Drawn(Enum):
    """How many random numbers a rounding draws."""

    NOTHING = 0
    A_BUCKET = 1  # one a bucket
    A_VALUE = 2  # one a value


@dataclass(frozen=True, kw_only=True)
class Properties:
    """What the codec, the wire and its report ask of a rounding."""

    words: str
    """The rounding in words, for users."""

    drawn: Drawn
    """The numbers r of [Note: Grid], which sender and receiver draw alike."""

    is_taken_back: bool = False
    """Whether the receiver adds r to the code."""

    rounds_down: bool = False
    """Whether t + (r + 1/2) is rounded down, where else t - r is rounded to the nearest."""

    has_levels: bool = False
    """Whether it serves learned levels too.
    There one that draws a number for each value goes to either neighbour by it, one that draws
    nothing to the nearer.
    """

    keeps_grids: bool = False
    """Whether it serves grids that are kept for many steps: [Note: Changes].
    What it draws, the receiver draws too, or it draws nothing.
    """

    is_biased: bool = False
    """Whether a value differs, on average over the numbers, from what it is decoded to.
    The report of the handle says so.
    """


class Rounding(IntEnum):
    """A rounding by its code, which stands in segment tables and goes into the hash of a plan.

    A code is never given to another rounding. Codes go up from 0 without gaps, as in
    csrc/common/rounding.h.
    """

    SHIFT = 0
    DITHER = 1
    STOCHASTIC = 2
    NEAREST = 3

    @property
    def properties(self) -> Properties:
        """What is asked of it."""
        return _PROPERTIES[self]

    @property
    def label(self) -> str:
        """What users call it: ``shift`` for SHIFT, with hyphens for underscores."""
        return self.name.lower().replace("_", "-")

    @classmethod
    def of(cls, label: str) -> Rounding:
        """The rounding that users call ``label``; raises KeyError where there is none."""
        return cls[label.upper().replace("-", "_")]


_PROPERTIES = {
    Rounding.SHIFT: Properties(
        words="one random shift a bucket", drawn=Drawn.A_BUCKET, is_taken_back=True
    ),
    Rounding.DITHER: Properties(
        words="one random shift a value",
        drawn=Drawn.A_VALUE,
        is_taken_back=True,
        keeps_grids=True,
    ),
    Rounding.STOCHASTIC: Properties(
        words="up or down by a coin flip", drawn=Drawn.A_VALUE, rounds_down=True, has_levels=True
    ),
    Rounding.NEAREST: Properties(
        words="to the nearer one",
        drawn=Drawn.NOTHING,
        has_levels=True,
        keeps_grids=True,
        is_biased=True,
    ),
}
