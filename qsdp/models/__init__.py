"""Models: the GPT-2 architecture, and the way from and to Hugging Face checkpoints."""

from qsdp.models.gpt import (
    GPT,
    PRESETS,
    GPTConfig,
    flops_per_token,
    generate,
    init_weights,
    local_slices,
)
from qsdp.models.huggingface import (
    config_from_huggingface,
    export_huggingface,
    fill,
    find_tensors,
    load_huggingface,
    load_huggingface_weights,
)

__all__ = [
    "GPT",
    "PRESETS",
    "GPTConfig",
    "config_from_huggingface",
    "export_huggingface",
    "fill",
    "find_tensors",
    "flops_per_token",
    "generate",
    "init_weights",
    "load_huggingface",
    "load_huggingface_weights",
    "local_slices",
]
