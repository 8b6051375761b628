"""Trainings in which the groups of one rank get other gradients than those of its peers."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import qsdp
from tests_distributed.support.helpers import all_ranks


class Chooser(nn.Module):
    """Layers of which each forward pass uses those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.left = nn.Linear(6, 6)
        self.right = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 9)

    def forward(self, x_BC: Tensor, chosen: str) -> Tensor:
        x_BC = torch.tanh(self.first(x_BC))
        return sum(self.get_submodule(name)(x_BC).square().sum() for name in chosen.split())


class Tower(nn.Module):
    """Two choosers, one after the other in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Chooser() for _ in range(2))

    def forward(self, x_BC: Tensor, *chosen: str) -> Tensor:
        return sum(block(x_BC, names) for block, names in zip(self.blocks, chosen, strict=True))


def tower(config: dict[str, Any] | None, device: str = "cpu") -> tuple[Any, Any]:
    model: Any = Tower().to(device)
    mesh = all_ranks(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    handle = None if config is None else qsdp.install(model, qsdp.QSDPConfig(**config))
    return model, handle


def noise(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(4, 6, generator=generator)


def train_apart(
    steps: list[list[str]], odd: int, config: dict[str, Any], device: str = "cpu"
) -> tuple[str, float]:
    """Step by step: what the second block uses on most ranks, and on the odd one."""
    model, _ = tower(config, device)
    for step, choices in enumerate(steps):
        started = time.monotonic()
        try:
            chosen = choices[dist.get_rank() == odd]
            torch.autograd.backward(model(noise(step).to(device), "left right wide", chosen))
        except RuntimeError as error:
            return str(error), time.monotonic() - started
    return "trained on garbage", 0.0


ALIKE = ["left wide", "left wide"]
APART = {
    "at the first step": ([["left right", "left"]], "right"),
    "with sizes that are equal": ([["left", "right"]], "(left|right)"),
    "after good steps": ([ALIKE, ALIKE, ["left wide", "left"]], "wide"),
    "with more": ([ALIKE, ["left wide", "left right wide"]], "right"),
    "with another that is as large": ([ALIKE, ["left wide", "right wide"]], "(left|right)"),
    "when all change": ([ALIKE, ["right", "right wide"]], "wide"),
}
