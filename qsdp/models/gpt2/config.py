"""The size of a GPT-2, and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The size of a GPT. Raises ValueError when no such model can exist."""

    vocab_size: int
    """Tokens in the vocabulary."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads of a block; must divide `width`."""
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
                raise ValueError(
                    f"{name} is {value!r}, but a GPT needs a whole number from 1: change it."
                )
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} cannot be split over {self.num_heads} heads: "
                "choose a width that is a multiple of num_heads."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: choose a number from 0 up to below 1.")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """The preset `name` with `overrides` (those that are None are left out).

        `tiny`, `nano` and `mini` have no vocabulary of their own: give them the data's
        `vocab_size`.
        Raises ValueError for an unknown preset or a missing vocabulary.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no model preset {name!r}: choose one of {list(PRESETS)}.")
        fields = PRESETS[name] | {k: v for k, v in overrides.items() if v is not None}
        if "vocab_size" not in fields:
            raise ValueError(f"Preset {name!r} takes its vocabulary from the data: set vocab_size.")
        return cls(**fields)


def _gpt2(num_layers: int, num_heads: int, width: int, context: int = 1024) -> dict[str, Any]:
    return {
        "vocab_size": 50257,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "width": width,
        "context": context,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "num_heads": 2, "width": 64, "context": 64, "bias": False},
    "nano": {"num_layers": 4, "num_heads": 4, "width": 128, "context": 64, "bias": False},
    "mini": {"num_layers": 6, "num_heads": 8, "width": 256, "context": 128, "bias": False},
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "gpt-1.3b": _gpt2(24, 16, 2048, context=2048),
}
