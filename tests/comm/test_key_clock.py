"""Keys of many payloads at once, made once a step."""

from __future__ import annotations

import pytest
import torch

from qsdp.codec.random_numbers import Direction, Key, Stage, fold_all
from qsdp.comm.key_clock import Clock
from qsdp.comm.routes import received, sent

SEEDS = (0, 7, 2**63 - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_of_many_payloads_are_those_of_each(seed: int) -> None:
    senders, receivers = torch.tensor([0, 3, 2**31]), torch.tensor([5, 0, 1])
    found = fold_all(seed, 9, Direction.REDUCE, Stage.ACROSS, 2, senders, receivers)
    ends = zip(senders.tolist(), receivers.tolist(), strict=True)
    keys = [Key(seed, 9, Direction.REDUCE, Stage.ACROSS, 2, *each) for each in ends]
    assert found.tolist() == [key.fold() for key in keys]
    found = fold_all(seed, 9, Direction.GATHER, Stage.FLAT, 0, senders, receivers[1:2])
    keys = [Key(seed, 9, Direction.GATHER, Stage.FLAT, 0, each) for each in senders.tolist()]
    assert found.tolist() == [key.fold() for key in keys]


def test_keys_follow_the_step_the_seed_and_what_is_sent() -> None:
    clock = Clock(3)
    routes = [sent((0, 1, 2), 1, (4, 5, 6)), received((1,), 1, (4, 5, 6))]
    seen = []
    for step in (0, 1):
        clock.step = step
        for seed in (3, 4):
            clock.seed = seed
            for _ in range(2):  # the second time as the first
                gathers, frozen = clock.gather_keys(3), clock.frozen_keys(3)
                assert gathers.tolist() == [
                    Key(seed, step, Direction.GATHER, Stage.FLAT, 0, rank).fold()
                    for rank in range(3)
                ]
                assert frozen.tolist() == [
                    Key(seed, 0, Direction.FROZEN, Stage.FLAT, 0, rank).fold() for rank in range(3)
                ]
                assert clock.gather_keys(2).tolist() == gathers[:2].tolist()
                for occurrence in (0, 1):
                    for stage in (Stage.FLAT, Stage.LOCAL):
                        own, others = (
                            clock.reduce_keys(stage, occurrence, route).tolist() for route in routes
                        )
                        key = seed, step, Direction.REDUCE, stage, occurrence
                        assert own == [Key(*key, 5, row).fold() for row in (0, 2)]
                        assert others == [Key(*key, sender, 1).fold() for sender in (4, 6)]
            seen.append(gathers.tolist())
    assert len(set(map(tuple, seen))) == 4
