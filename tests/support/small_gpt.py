"""A small GPT of few distinct magnitudes, and its checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from qsdp import checkpoint
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.model import GPT
from qsdp.train.config import TrainConfig

SIZE = GPTConfig(vocab_size=11, num_layers=3, num_heads=2, width=16, context=8)


def save_model(folder: Path, size: GPTConfig = SIZE, tokenizer: str = "{}") -> GPT:
    """A model of few distinct magnitudes, and its checkpoint in ``folder``/checkpoints.

    Thresholds cut through ties of such magnitudes.
    """
    model = GPT(size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape) * 20).round() / 1000)
    meta = {
        "config": TrainConfig().as_dict(),
        "fingerprint": {"model": asdict(size)},
        "world_size": 1,
    }
    files = {"tokenizer.json": tokenizer}
    checkpoint.save(folder / "checkpoints", 7, model, None, meta, files=files)
    return model
