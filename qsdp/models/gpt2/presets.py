"""The presets of GPT-2, and how each is trained where no flag says it."""

from __future__ import annotations

from typing import Any


def _gpt2_size(num_layers: int, num_heads: int, width: int, context: int = 1024) -> dict[str, Any]:
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
    "gpt2": _gpt2_size(12, 12, 768),
    "gpt2-medium": _gpt2_size(24, 16, 1024),
    "gpt2-large": _gpt2_size(36, 20, 1280),
    "gpt2-xl": _gpt2_size(48, 25, 1600),
    "gpt-1.3b": _gpt2_size(24, 16, 2048, context=2048),
}

# Where they differ from nano's, which are the defaults of ``RunFlags``. Learning rates are those of
# GPT-3's models of the same size (arXiv 2005.14165, table 2.1); the global batch of about half a
# million tokens is left to --grad-accum, because it depends on the number of ranks.
_LARGE = {
    "steps": 100_000,
    "batch_size": 8,
    "seq_len": 1024,
    "warmup_steps": 2000,
    "beta2": 0.95,
    "precision": "bf16",
    "eval_every": 1000,
    "save_every": 1000,
}
TRAINING: dict[str, dict[str, Any]] = {
    "mini": {"steps": 1000, "seq_len": 128},
    "gpt2": _LARGE | {"lr": 6e-4},
    "gpt2-medium": _LARGE | {"lr": 3e-4},
    "gpt2-large": _LARGE | {"lr": 2.5e-4, "batch_size": 4},
    "gpt2-xl": _LARGE | {"lr": 2e-4, "batch_size": 4},
    "gpt-1.3b": _LARGE | {"lr": 2e-4, "batch_size": 4, "seq_len": 2048},
}
