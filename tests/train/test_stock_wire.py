"""The bytes of stock FSDP2 between nodes, which follow from gloo's rings."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qsdp.train.wire_bytes import StockWire, WireUse
from qsdp.train.world import World

SHARDS = (1000, 24)  # values of the root's shard and of a block's


def mean_use(
    monkeypatch: pytest.MonkeyPatch,
    num_ranks: int,
    ranks_per_node: int,
    replicas: int = 1,
    **world: Any,
) -> WireUse:
    """What one training step takes, the mean over ranks."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_per_node))
    root, block = nn.Linear(1, 1), nn.Linear(1, 1)
    groups = [
        SimpleNamespace(
            module=module,
            is_gathered=False,
            parameters=lambda n=numel: [
                SimpleNamespace(
                    padded_numel=n,
                    dtype=torch.bfloat16,
                    parameter=torch.empty(n * num_ranks // replicas, device="meta"),
                )
            ],
        )
        for module, numel in zip((root, block), SHARDS, strict=True)
    ]
    monkeypatch.setattr("qsdp.train.wire_bytes.parameter_groups", lambda model: groups)
    total = WireUse()
    for rank in range(num_ranks):
        fields: dict[str, Any] = {"device": torch.device("cpu"), "mesh": None, "backend": "gloo"}
        wire = StockWire(root, World(rank=rank, size=num_ranks, **(fields | world)), replicas)
        before = wire.total()
        block(root(torch.ones(1)))
        wire.reduced()
        total += wire.total() - before
        for module in (root, block):
            module._forward_pre_hooks.clear()
    return WireUse(**{name: value / num_ranks for name, value in vars(total).items()})


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2), (6, 2), (6, 3), (4, 1)])
def test_a_ring_leaves_each_node_once(
    monkeypatch: pytest.MonkeyPatch, ranks: int, per_node: int
) -> None:
    use = mean_use(monkeypatch, ranks, per_node)
    root, block = SHARDS
    assert use.gather_bytes == 2 * (ranks - 1) * (root + 2 * block)
    assert use.reduce_bytes == 2 * 4 * (ranks - 1) * (root + block)
    assert use.gather_inter_node_bytes == pytest.approx(use.gather_bytes / per_node)
    assert use.reduce_inter_node_bytes == pytest.approx(use.reduce_bytes / per_node)


def test_replicas_of_a_node_each_cross_nodes_only_to_be_averaged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use = mean_use(monkeypatch, 6, 2, replicas=3)
    root, block = SHARDS
    averaged = 2 * 2 / 3 * 4 * (root + block)
    assert use.gather_inter_node_bytes == 0
    assert use.reduce_inter_node_bytes == pytest.approx(averaged)
    assert use.reduce_bytes == pytest.approx(2 * 4 * (root + block) + averaged)
    assert use.fp32_bytes == pytest.approx(4 * (2 * root + 3 * block) + averaged)


def test_what_nccl_sends_between_nodes_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    use = mean_use(monkeypatch, 4, 2, backend="nccl")
    assert math.isnan(use.gather_inter_node_bytes)
    assert math.isnan(use.reduce_inter_node_bytes)
    use = mean_use(monkeypatch, 4, 4, backend="nccl")
    assert use.gather_inter_node_bytes == use.reduce_inter_node_bytes == 0


def test_the_time_of_stock_collectives_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert math.isnan(mean_use(monkeypatch, 2, 1).gather_wire_s)
