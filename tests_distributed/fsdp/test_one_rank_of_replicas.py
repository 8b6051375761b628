"""One rank or one replica differs: all ranks raise one sentence, and none hangs."""

from __future__ import annotations

import re

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import qsdp
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.one_rank import (
    UP,
    Act,
    Point,
    Stage,
    both,
    in_no_grad_and_train,
    say,
    set_pruned,
    train,
)
from tests_distributed.support.running import Run

SHARED = r"rank (\d) cannot do what the others do at a backward pass: "


class ReplicaStage(Stage):
    """As ``Stage``, on two replicas of two ranks each, whose average is qsdp's."""

    def __init__(self, point: Point, rank: int, odd: int) -> None:
        self.rank, self.odd = rank, odd
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        self.model = shard(make_model(num_layers=1, **point.model), mesh=self.mesh["shard"])
        self.batch = make_batch(self.model, 0)
        self.handle = qsdp.install(self.model, replicate_mesh=self.mesh["replicate"])


def _train_frozen(stage: Stage) -> None:
    stage.parameter(UP).requires_grad_(False)
    stage.train()


def _train_exact(stage: Stage) -> None:
    with stage.handle.exact():
        stage.train()


def _at_step(stage: Stage) -> None:
    stage.handle.load_state_dict(stage.handle.state_dict() | {"step": 5})
    stage.train()


def _lift_and_train(stage: Stage) -> None:
    stage.handle.set_support(None)
    stage.train()


def _train_unused(stage: Stage) -> None:
    """A pass in which a norm gets no gradient."""
    model = stage.model
    norm, model.norm = model.norm, nn.Identity()
    try:
        stage.train()
    finally:
        model.norm = norm


# What some do while the others train, what all do before, and what differs: in a forward pass of
# one replica, and between the two.
REPLICAS: dict[str, tuple[Act, Act, str, str]] = {
    "frozen": (_train_frozen, train, f"frozen parameters (none|{UP})", "the same"),
    "exact": (_train_exact, train, "weights (exact|quantized)", r"step \d"),
    "step": (_at_step, train, r"step \d", "the same"),
    "masks": (_lift_and_train, set_pruned, "masks (lifted|of call 1 of set_support)", "the same"),
    "unused": (_train_unused, lambda stage: None, "", "unused"),
    "unused later": (_train_unused, train, "", "unused"),
    "evaluated": (in_no_grad_and_train, train, "gradients (on|off)", ""),
}


def go_through_replicas(odds: list[int]) -> dict[str, str]:
    """What this rank says at each point, where the ranks ``odds`` differ."""
    rank = dist.get_rank()
    said = {}
    for name, (there, before, *_) in REPLICAS.items():
        point = Point(there=there, elsewhere=train, says=both(""), before=before)
        said[name] = say(point, rank if rank in odds else -1, ReplicaStage)
    return said


def ask_for_errors(odds: list[int]) -> str:
    """Ranks ``odds`` ask for the errors while the others train."""
    rank = dist.get_rank()
    there = lambda stage: stage.handle.errors()  # noqa: E731
    point = Point(there=there, elsewhere=train, says=both(""), before=train)
    return say(point, rank if rank in odds else -1, ReplicaStage)


@pytest.mark.parametrize("odds", [[0], [3], [2, 3]])
def test_another_call_than_training_reaches_the_replicas(run: Run, odds: list[int]) -> None:
    calls = r"(handle\.errors|a (for|back)ward pass)"
    for said in run(4, ask_for_errors, odds):
        told = rf"({SHARED})?rank \d is at {calls} while rank \d is at {calls}: .*"
        assert re.fullmatch(told, said), said


@pytest.mark.parametrize(
    "odds",
    [
        *([3], [0, 1], [0, 1, 2, 3]),
        *(pytest.param(odds, marks=pytest.mark.heavy) for odds in ([0], [2, 3])),
    ],
)
def test_when_one_rank_or_replica_differs_all_raise_but_not_when_all_do(
    run: Run, odds: list[int]
) -> None:
    everyone = run(4, go_through_replicas, odds)
    for name, (*_, alone, apart) in REPLICAS.items():
        between = alone if apart == "the same" else apart
        for said in (each[name] for each in everyone):
            if len(odds) == 4 or (len(odds) == 2 and not between):
                assert said == "nothing", name
            elif apart == "unused":
                missing = (
                    r"rank \d has no gradient of norm.weight and norm.bias to reduce, but rank"
                )
                assert re.fullmatch(f"{missing}.*", said), f"{name}: {said}"
            elif len(odds) == 2:
                here = rf"rank \d is at a backward pass with {between}, but rank \d with .*"
                assert re.fullmatch(here, said), f"{name}: {said}"
            else:
                here = rf"({SHARED})?rank \d is at a forward pass with {alone}, but rank \d with .*"
                assert re.fullmatch(here, said), f"{name}: {said}"


@pytest.mark.parametrize("odds", [[0], [3], [2, 3]])
def test_with_fsdps_own_average_the_other_replica_hears_too(run: Run, odds: list[int]) -> None:
    for rank, said in enumerate(run(4, _evaluate_on_own_average, odds)):
        alone = rank // 2 == odds[0] // 2
        here = r"rank \d is at a forward pass with gradients (on|off), but rank \d with .*"
        assert re.fullmatch("nothing" if len(odds) == 2 else ("" if alone else SHARED) + here, said)


def _evaluate_on_own_average(odds: list[int]) -> str:
    rank = dist.get_rank()
    act = in_no_grad_and_train
    point = Point(there=act, elsewhere=train, says=both(""), before=train)
    return say(point, rank if rank in odds else -1, HybridStage)


class HybridStage(Stage):
    """As ``Stage``, on two replicas of two ranks each, whose average is FSDP2's."""

    def __init__(self, point: Point, rank: int, odd: int) -> None:
        self.rank, self.odd = rank, odd
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        self.model = shard(make_model(num_layers=1), mesh=mesh)
        self.batch = make_batch(self.model, 0)
        self.handle = qsdp.install(self.model)
