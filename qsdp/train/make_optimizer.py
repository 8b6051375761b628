"""The optimizer of a run: AdamW, and what its method wraps around it."""

from __future__ import annotations

import torch

from qsdp.methods.method import RunSettings
from qsdp.models.language_model import LanguageModel
from qsdp.train.config import TrainConfig


def make_optimizer(config: TrainConfig, model: LanguageModel) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only, in the method's wrapper if there is one.

    Raises ValueError where the model cannot be compressed as asked.
    """
    run = config.run
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": run.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # One launch for many tensors: DTensors one by one take longer than their arithmetic.
    base = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, run.beta2), fused=True)
    settings = RunSettings(
        steps=run.steps,
        seed=run.seed,
        max_norm=run.clip_grad or None,
        prunable=config.compression.patterns,
    )
    return config.method.wrap(model, base, settings)
