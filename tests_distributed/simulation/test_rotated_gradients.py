"""Training whose gradients are rotated equals its simulation, bit for bit."""

from __future__ import annotations

import random
from typing import Any

from tests_distributed.support.running import Run, selection
from tests_distributed.support.trainings import (
    BF16,
    FP16,
    FP32,
    Case,
    assert_training_equals_its_simulation,
)


def _case(config: dict[str, Any] | None = None, **settings: Any) -> Case:
    rotated = {"grad_bits": 4, "grad_rotation": "hadamard", "bucket_size": 24}
    return Case(**settings, config=rotated | (config or {}))


TWO_HOPS = {"reduce": "two-hop", "ranks_per_node": 2}
CASES = {
    "uneven and empty, tied, frozen and unused, gathered by changes": _case(
        {"gather": "delta", "weight_bits": 4, "embedding_bits": 3},
        ranks=4,
        options={"tied": True, "frozen": True, "unused": True},
    ),
    "two hops of pruned gradients in bf16, after a warm-up": _case(
        TWO_HOPS | {"warmup_steps": 1, "warmup_bits": 8},
        ranks=4,
        sparse=True,
        dtypes=(BF16, BF16),
    ),
    "quantized replicas, accumulated": _case(
        ranks=2, replicas=2, quantized_replicas=True, micro_batches=2
    ),
    "a budget and learned levels": _case(
        {"budget": 6.0, "bucket_size": 64, "levels": "learned", "level_steps": (1, 2)}
    ),
    "whole buckets": _case({"bucket_size": None, "grad_bits": 3}, options={"width": 32}),
    "two hops, coded inside nodes too": _case(
        TWO_HOPS | {"bucket_size": None, "local_grad_bits": 5}, ranks=4, options={"width": 24}
    ),
    "quantized replicas of pruned gradients in fp16": _case(
        ranks=2, replicas=2, quantized_replicas=True, sparse=True, dtypes=(FP32, FP16)
    ),
    "native replicas": _case(ranks=2, replicas=2, max_norm=0.1),
    "some are not": _case({"policy": (("*.mlp.*", (4, 7)), ("head.*", (8, 3)))}, ranks=3),
    "recomputed in bf16": _case(
        ranks=3, dtypes=(BF16, FP32), options={"checkpointing": True}, micro_batches=2
    ),
}


LIGHT = list(CASES)[:2]
"""They have most of what others have in other company."""


@selection("name", [(name,) for name in LIGHT], tuple(CASES))
def test_rotated_training_equals_its_simulation(run: Run, name: str) -> None:
    assert_training_equals_its_simulation(run, CASES[name], random.randrange(1 << 30))
