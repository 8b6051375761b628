"""A small classifier, its batches, and its training simulated and plain."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qsdp
from qsdp.simulation.simulated_grids import ShardGrids

SGD = 0.1


class Net(nn.Module):
    """Classifies sequences of token numbers; returns the mean cross-entropy."""

    def __init__(self, seed: int = 0, recompute: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(11, 12)
            self.block = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
            self.norm = nn.LayerNorm(12)
            self.out = nn.Linear(12, 5)
        self.recompute = recompute

    def forward(self, tokens_BT: Tensor, targets_B: Tensor) -> Tensor:
        x_BTC = self.embed(tokens_BT)
        if self.recompute:
            x_BTC = x_BTC + checkpoint(self.block, x_BTC, use_reentrant=False)
        else:
            x_BTC = x_BTC + self.block(x_BTC)
        return F.cross_entropy(self.out(self.norm(x_BTC).mean(1)), targets_B)


class Resting(Net):
    """Leaves its block out where it is told to."""

    def forward(self, tokens_BT: Tensor, is_used: Any) -> Tensor:
        x_BTC = self.embed(tokens_BT)
        x_BTC = self.block(x_BTC) if is_used else x_BTC
        loss: Tensor = self.out(self.norm(x_BTC)).square().mean()
        return loss


def rest(simulated: qsdp.Simulation, seed: int, is_used: bool) -> None:
    """A step of a ``Resting`` on 4 ranks."""
    simulated.step([[[own[0], is_used] for own in batches(seed, 4)[0]]])


def batch(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(11, (4, 6), generator=generator)
    return [tokens_BT, torch.randint(5, (4,), generator=generator)]


def batches(seed: int, num_ranks: int, num_micro: int = 1) -> list[list[list[Tensor]]]:
    return [
        [batch(1000 * seed + 100 * micro + rank) for rank in range(num_ranks)]
        for micro in range(num_micro)
    ]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=SGD)


def simulation(
    config: dict[str, Any] | None = None, model: nn.Module | None = None, **options: Any
) -> qsdp.Simulation:
    options = {"world_size": 4, "optimizer": sgd, "groups": ["block"]} | options
    return qsdp.simulate(
        Net() if model is None else model, qsdp.QSDPConfig(**config or {}), **options
    )


def run(simulated: qsdp.Simulation, steps: int = 3, num_ranks: int = 4) -> dict[str, Tensor]:
    for step in range(steps):
        simulated.step(batches(step, num_ranks))
    return simulated.state()


def train_plainly(model: nn.Module, num_ranks: int, steps: int = 3) -> dict[str, Tensor]:
    """The mean of all ranks' gradients, exact weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD)
    for step in range(steps):
        for each in batches(step, num_ranks)[0]:
            (model(*each) / num_ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance, msg=name)


def error(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return sum(float((left[name] - right[name]).square().sum()) for name in left)


def rate(lr: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def grids(simulated: qsdp.Simulation) -> dict[tuple[str, int], ShardGrids]:
    """The kept grids, by parameter and rank."""
    assert simulated._wire.grids is not None
    groups = simulated._wire.grids._kept.values()
    return {place: kept for group in groups for place, (kept, _) in group.shards.items()}


def epochs(simulated: qsdp.Simulation, name: str) -> Tensor:
    """The epochs of all buckets of a parameter, all ranks' together."""
    return torch.cat([kept.epoch for (own, _), kept in grids(simulated).items() if own == name])
