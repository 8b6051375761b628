"""What the trainer refuses before it shards: named by the flag."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsdp.train.config import TrainConfig
from qsdp.train.parallelize import check_nodes, check_replicas
from qsdp.train.world import World


def check(num_ranks: int, **flags: Any) -> None:
    config = TrainConfig.of(model="nano", **flags)
    mesh: Any = None
    world = World(0, num_ranks, torch.device("cpu"), "gloo", mesh)
    check_replicas(config, world)
    check_nodes(config, world)


def test_replicas_of_one_rank_are_refused_where_qsdp_averages_them() -> None:
    with pytest.raises(ValueError, match=r"^--replicas is 6, .* choose 1 or 2 or 3, or leave out"):
        check(6, replicas=6, qsdp_bits=8)
    with pytest.raises(ValueError, match=r"^--replicas is 4, which does not divide the 6 ranks"):
        check(6, replicas=4, qsdp_bits=8)
    check(6, replicas=3, qsdp_bits=8)
    check(6, replicas=6)
    check(1, qsdp_bits=8)


def test_nodes_that_do_not_split_the_ranks_evenly_are_refused() -> None:
    flags: dict[str, Any] = {"qsdp_bits": 8, "qsdp_reduce": "two-hop"}
    with pytest.raises(ValueError, match=r"^--qsdp-ranks-per-node is 3, .* the 4 ranks evenly"):
        check(4, qsdp_ranks_per_node=3, **flags)
    with pytest.raises(ValueError, match=r"the 4 ranks of a replica evenly"):
        check(8, replicas=2, qsdp_ranks_per_node=3, **flags)
    check(4, qsdp_ranks_per_node=2, **flags)
    check(4, qsdp_ranks_per_node=8, **flags)
    check(4, qsdp_ranks_per_node=3, **flags | {"qsdp_reduce": "flat"})


def test_nodes_between_whose_ranks_there_is_nothing_to_keep_are_refused() -> None:
    flags: dict[str, Any] = {
        "qsdp_bits": 4,
        "qsdp_gather": "delta",
        "qsdp_delta_codes": "node",
    }
    for size, per_node in ((4, 1), (4, 3), (4, 4), (4, 8), (2, 2)):
        with pytest.raises(ValueError) as raised:
            check(size, qsdp_ranks_per_node=per_node, **flags)
        message = str(raised.value)
        assert message.startswith(f"--qsdp-ranks-per-node is {per_node}, ")
        assert "--qsdp-delta-codes node" in message
        assert ("choose 2, or" in message) == (size == 4)
    with pytest.raises(ValueError, match=r"the 2 ranks of a replica"):
        check(4, replicas=2, qsdp_ranks_per_node=2, **flags)
    with pytest.raises(ValueError, match=r"choose 2 or 3, or leave out --qsdp-delta-codes\.$"):
        check(6, qsdp_ranks_per_node=4, **flags)
    check(4, qsdp_ranks_per_node=2, **flags)
    check(8, replicas=2, qsdp_ranks_per_node=2, **flags)
    check(4, **flags)  # whatever nodes there are
    check(4, qsdp_ranks_per_node=3, **flags | {"qsdp_delta_codes": "rank"})
