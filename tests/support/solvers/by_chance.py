"""Random scores, few distinct ones, so that many are tied."""

from __future__ import annotations

import torch
from torch import Tensor

from qsdp.oneshot.by_score import ByScore
from qsdp.oneshot.solver import Solver
from qsdp.sparsity.local_shards import LocalShard


def whole_scores(index: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(1, 99, shape, generator=generator).float()


def _scores(index: int, shard: LocalShard) -> Tensor:
    places = zip(shard.offset, shard.values.shape, strict=True)
    own = tuple(slice(begin, begin + size) for begin, size in places)
    return whole_scores(index, shard.shape)[own]


SOLVER: Solver = ByScore(_scores)
