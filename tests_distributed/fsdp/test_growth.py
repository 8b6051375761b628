"""Nothing grows from step to step, whatever of a step changes each time."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import qsdp
from qsdp.comm import group_plan
from tests.support.growth import Experts, grown_since, held
from tests_distributed.support.helpers import all_ranks
from tests_distributed.support.running import Run

WIDTH, EXPERTS = 16, 8
HALVES = itertools.combinations(range(1, EXPERTS), EXPERTS // 2)
SETS = [part for half in HALVES for part in (half, tuple({*range(EXPERTS)} - {*half}))]
"""Two in turn have all, so that two steps learn all that there is to learn."""
MOST_LAYOUTS = 3
CLOCK = 15
"""By which the step in the keys advances in a round."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Experts(WIDTH, EXPERTS)])
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x_BC: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x_BC = block(x_BC)
        # Users return parameters too: they live longer than a step.
        return (x_BC * self.scale).square().mean(), self.scale


class Rounds:
    """Rounds of training in which every step has other sets, masks, shapes and methods."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.model = Model()
        self.experts: Any = self.model.blocks[0]
        for module in (self.experts, self.model):
            fully_shard(module, mesh=all_ranks())
        self.base = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.step = 0
        self.options = options
        self.handle = self.install()

    def install(self) -> qsdp.Handle:
        config = qsdp.QSDPConfig(
            weight_bits=4,
            bucket_size=64,
            levels="learned",
            level_steps=tuple(CLOCK * n + place for n in range(10) for place in (3, 4)),
            budget=5.0,
            **self.options,
        )
        return qsdp.install(self.model, config)

    @property
    def clock(self) -> int:
        state = self.handle.state_dict()
        return int(state["step"] + state["reduced"])

    def batch(self) -> Tensor:
        self.experts.chosen = SETS[self.step % len(SETS)]
        return torch.randn(1 + self.step % 5, WIDTH)

    def backward(self) -> Tensor:
        loss, _ = self.model(self.batch())
        loss.backward()
        return loss.detach()

    def plain(self) -> None:
        self.step += 1
        idle = [i for i in range(EXPERTS) if i not in SETS[self.step % len(SETS)]]
        for i in random.Random(self.step).sample(idle, 2):
            self.experts.layers[i].requires_grad_(False)
        self.backward()
        self.base.step()
        self.base.zero_grad()
        self.experts.requires_grad_(True)

    def masked(self) -> None:
        weights = [layer.weight for layer in self.experts.layers]
        # Of the first one all: buffers are then as large as they ever get.
        share = 0.2 + 0.1 * (self.step % 5) if self.step > CLOCK else 1.0
        masks = {p: torch.rand(p.to_local().shape) <= share for p in weights}
        before = [p.to_local().clone() for p in weights]
        with torch.no_grad():
            for p, keep in masks.items():
                p.to_local().masked_fill_(~keep, 0)
        self.handle.set_support(masks, with_grads=self.step % 2 == 0)
        self.step += 1
        self.backward()
        self.base.zero_grad()
        self.handle.set_support(None)
        with torch.no_grad():
            for p, values in zip(weights, before, strict=True):
                p.to_local().copy_(values)

    def method(self, optimizer: Any, steps: int) -> None:
        optimizer.share_support(self.handle.set_support)
        for _ in range(steps):
            self.step += 1
            optimizer.step(self.backward)
            optimizer.zero_grad()

    def cut_short(self) -> None:
        """By an exception in the forward pass, and by one in the backward pass."""

        def fail(*_: Tensor) -> None:
            raise LookupError

        loss, _ = self.model(self.batch())
        loss.register_hook(fail)
        for run in (lambda: self.model(torch.ones(1, WIDTH + 1)), loss.backward):
            with pytest.raises((LookupError, RuntimeError)):
                run()

    def accumulated(self) -> None:
        root: Any = self.model
        for is_last in (False, True):
            root.set_requires_gradient_sync(is_last)
            self.backward()
        self.base.zero_grad()

    def look(self) -> None:
        with self.handle.exact(), torch.inference_mode():
            self.model(self.batch())
        with qsdp.compressed(self.model, 0.1 + 0.01 * (self.step % 50)), torch.no_grad():
            self.model(self.batch())
        with self.handle.measuring():
            self.plain()
        self.handle.errors()
        self.handle.report()

    def round(self) -> None:
        before = self.clock
        for _ in range(6):
            self.plain()
        self.masked()
        self.method(qsdp.CrAM(self.model, self.base, sparsity=("2:4", 0.5, 0.7)), 2)
        schedule = qsdp.ACDCSchedule(steps=10**6, warmup=1, phase=1, last_dense=0, last_sparse=1)
        masked = qsdp.ACDC(self.model, self.base, schedule=schedule, target=0.5)
        self.method(masked, 2)
        masked.load_state_dict(masked.state_dict())
        self.look()
        self.cut_short()
        self.accumulated()
        assert self.clock == before + CLOCK  # or rounds would not end alike

    def install_again(self) -> None:
        state = self.handle.state_dict()
        self.handle.remove()
        self.handle = self.install()
        self.handle.load_state_dict(state)
        self.model(self.batch())


def _grown(options: dict[str, Any]) -> list[dict[str, tuple[int, int]]]:
    most, group_plan._MOST_LAYOUTS = group_plan._MOST_LAYOUTS, MOST_LAYOUTS
    found = []
    try:
        training = Rounds(options)
        for act in (training.round, training.install_again):
            act()
            act()
            before = held()
            act()
            act()
            found.append(grown_since(before))
    finally:
        group_plan._MOST_LAYOUTS = most
    return found


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"gather": "once"}),
        pytest.param(2, {}, marks=pytest.mark.heavy),
        pytest.param(4, {"reduce": "two-hop", "ranks_per_node": 2}, marks=pytest.mark.heavy),
    ],
)
def test_nothing_grows_with_the_steps(run: Run, ranks: int, options: dict[str, Any]) -> None:
    for more in run(ranks, _grown, options):
        assert more == [{}, {}]
