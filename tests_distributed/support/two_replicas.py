"""Two replicas of two ranks each, whose average may be put off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import qsdp


class Two(nn.Module):
    """A layer that is always used, and one that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x_BC: Tensor, is_whole: bool = True) -> Tensor:
        y_BC = self.first(x_BC)
        return (self.second(y_BC) if is_whole else y_BC).square().sum()


class Stage:
    """Two replicas of two ranks."""

    def __init__(self) -> None:
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        torch.manual_seed(0)
        self.model: Any = fully_shard(Two(), mesh=self.mesh["shard"])
        self.handle = qsdp.install(self.model, replicate_mesh=self.mesh["replicate"])

    def train(self, seed: int, *, averages: bool, is_whole: bool = True) -> None:
        generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
        self.model.set_requires_all_reduce(averages)
        self.model(torch.randn(3, 6, generator=generator), is_whole).backward()


def refusal_of(work: Callable[[], object]) -> str:
    """What refuses ``work``."""
    try:
        work()
    except RuntimeError as error:
        return str(error)
    return "nothing"
