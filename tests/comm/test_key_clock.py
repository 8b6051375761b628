"""Keys of many payloads at once, made once a step."""

from __future__ import annotations

import pytest
import torch

from qsdp.codec.random_numbers import KeyDirection, KeyStage, RandomKey, fold_keys
from qsdp.comm.key_clock import Clock
from qsdp.comm.routes import received_route, sent_route

SEEDS = (0, 7, 2**63 - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_of_many_payloads_are_those_of_each(seed: int) -> None:
    senders, receivers = torch.tensor([0, 3, 2**31]), torch.tensor([5, 0, 1])
    found = fold_keys(seed, 9, KeyDirection.REDUCE, KeyStage.ACROSS, 2, senders, receivers)
    ends = zip(senders.tolist(), receivers.tolist(), strict=True)
    keys = [RandomKey(seed, 9, KeyDirection.REDUCE, KeyStage.ACROSS, 2, *each) for each in ends]
    assert found.tolist() == [key.fold() for key in keys]
    found = fold_keys(seed, 9, KeyDirection.GATHER, KeyStage.FLAT, 0, senders, receivers[1:2])
    keys = [
        RandomKey(seed, 9, KeyDirection.GATHER, KeyStage.FLAT, 0, each) for each in senders.tolist()
    ]
    assert found.tolist() == [key.fold() for key in keys]


def test_keys_follow_the_step_the_seed_and_what_is_sent() -> None:
    clock = Clock(3)
    routes = [sent_route((0, 1, 2), 1, (4, 5, 6)), received_route((1,), 1, (4, 5, 6))]
    seen = []
    for step in (0, 1):
        clock.step = step
        for seed in (3, 4):
            clock.seed = seed
            for _ in range(2):  # the second time as the first
                gathers, frozen = clock.gather_keys(3), clock.frozen_keys(3)
                assert gathers.tolist() == [
                    RandomKey(seed, step, KeyDirection.GATHER, KeyStage.FLAT, 0, rank).fold()
                    for rank in range(3)
                ]
                assert frozen.tolist() == [
                    RandomKey(seed, 0, KeyDirection.FROZEN, KeyStage.FLAT, 0, rank).fold()
                    for rank in range(3)
                ]
                assert clock.gather_keys(2).tolist() == gathers[:2].tolist()
                for occurrence in (0, 1):
                    for stage in (KeyStage.FLAT, KeyStage.LOCAL):
                        own, others = (
                            clock.reduce_keys(stage, occurrence, route).tolist() for route in routes
                        )
                        key = seed, step, KeyDirection.REDUCE, stage, occurrence
                        assert own == [RandomKey(*key, 5, row).fold() for row in (0, 2)]
                        assert others == [RandomKey(*key, sender, 1).fold() for sender in (4, 6)]
            seen.append(gathers.tolist())
    assert len(set(map(tuple, seen))) == 4
