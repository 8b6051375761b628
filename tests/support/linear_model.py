"""A linear layer and its optimizer, which checkpoints are made of."""

from __future__ import annotations

import torch
from torch import nn


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(5, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
