"""What the size of any language model says."""

from __future__ import annotations

from dataclasses import Field
from typing import Any, ClassVar, Protocol


class ModelSize(Protocol):
    """The size of a model: a frozen dataclass of integers, floats, booleans and texts.

    Checkpoints and exports keep its fields as JSON, so that a field may be added later, with a
    default, but none renamed or taken away. A family's size may have more fields than these, and
    raises ValueError when no such model can exist.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""

    @property
    def num_layers(self) -> int:
        """Blocks, which are alike; 1 is always possible."""

    @property
    def width(self) -> int:
        """Values that describe one token between blocks."""

    @property
    def context(self) -> int:
        """Longest sequence, in tokens."""
