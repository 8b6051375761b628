"""How each model preset is trained where no flag says it."""

from __future__ import annotations

from typing import Any

# Where they differ from nano's, which are the defaults of `RunFlags`. Learning rates are those of
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
RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "nano": {},
    "mini": {"steps": 1000, "seq_len": 128},
    "gpt2": _LARGE | {"lr": 6e-4},
    "gpt2-medium": _LARGE | {"lr": 3e-4},
    "gpt2-large": _LARGE | {"lr": 2.5e-4, "batch_size": 4},
    "gpt2-xl": _LARGE | {"lr": 2e-4, "batch_size": 4},
    "gpt-1.3b": _LARGE | {"lr": 2e-4, "batch_size": 4, "seq_len": 2048},
}
