"""The size of a GPT-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qsdp.models.gpt2.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The size of a GPT. Raises ValueError when no such model can exist."""

    vocab_size: int
    """Tokens in the vocabulary."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads of a block; must divide ``width``."""
    width: int
    """Values that describe one token between blocks."""
    context: int
    """Longest sequence, in tokens."""
    bias: bool = True
    """Whether linears and norms have biases, as GPT-2's do."""
    dropout: float = 0.0
    """Probability of dropping a value in training: of the embeddings, attention and branches."""
    tie_weights: bool = True
    """Whether the output head is the token embedding itself."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "num_heads", "width", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: choose a whole number from 1 on.")
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} cannot be split over {self.num_heads} heads: "
                "choose a width that is a multiple of num_heads."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: choose a number from 0 up to below 1.")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """The preset ``name`` with ``overrides`` (those that are None are left out).

        ``tiny``, ``nano`` and ``mini`` have no vocabulary of their own: give them the data's
        ``vocab_size``. Raises ValueError for an unknown preset or a missing vocabulary.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no model preset {name!r}: choose one of {list(PRESETS)}.")
        fields = PRESETS[name] | {k: v for k, v in overrides.items() if v is not None}
        if "vocab_size" not in fields:
            raise ValueError(f"preset {name!r} takes its vocabulary from the data: set vocab_size.")
        return cls(**fields)
