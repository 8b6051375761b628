"""The smallest magnitudes are pruned: what CrAM, AC/DC and gradual pruning train a model for."""

from __future__ import annotations

from torch import Tensor

from qsdp.oneshot.by_score import ByScore
from qsdp.oneshot.solver import Solver
from qsdp.sparsity.local_shards import LocalShard


def _magnitudes(index: int, shard: LocalShard) -> Tensor:
    return shard.values


SOLVER: Solver = ByScore(_magnitudes)
