"""What a solver does to a sharded model is what it does to the whole one."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qsdp import oneshot
from qsdp.oneshot.registry import SOLVERS
from tests_distributed.support.helpers import Conv1D, full_state
from tests_distributed.support.running import Run


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(8, 5), Conv1D(8, 7), nn.Linear(16, 1), nn.LayerNorm(4)]
        self.blocks = nn.ModuleList(layers)


def _layers() -> Layers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Layers()


def _compare(targets: list[str]) -> None:
    for target in targets:
        plain, model = _layers(), fully_shard(_layers())
        with oneshot.compressed(model, target, method="by_chance") as weights:
            inside = {name: weight.full_tensor() for name, weight in weights.items()}
        untouched = full_state(model)
        for name, weight in _layers().state_dict().items():
            assert torch.equal(untouched[name], weight), name
        expected = oneshot.compress_(plain, target, method="by_chance")
        masks = oneshot.compress_(model, target, method="by_chance")
        assert masks.keys() == expected.keys() == inside.keys()
        for name, weight in full_state(model).items():
            assert torch.equal(weight, plain.state_dict()[name]), (name, target)
            assert torch.equal(weight, inside.get(name, weight)), (name, target)
        for name, mask in masks.items():
            part = model.get_parameter(name)
            assert isinstance(part, DTensor)
            # Which of the kept ones were 0 before, or were rounded to it, no mask says.
            assert not part.to_local()[~mask.unpack()].any()


def _with_solver(targets: list[str]) -> None:
    with mock.patch.dict(SOLVERS, by_chance="tests.support.solvers.by_chance"):
        _compare(targets)


def test_what_stays_does_not_depend_on_the_ranks(run: Run) -> None:
    run(3, _with_solver, ["0.6", "0.5+layer+block4", "2:4+4bit"])
