"""Groups and state that are replaced, added or dropped in between, and bases that are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.gmp.optimizer import GMP
from qsdp.methods.sam.optimizer import SAM
from tests.support.optimizers import (
    METHODS,
    adamw,
    closure_of,
    of_every_method,
    said,
    train,
    weights,
)
from tests_distributed.support.helpers import make_model


@of_every_method
def test_groups_and_state_are_the_bases_whoever_is_given_others(method: str) -> None:
    model, plain = make_model(1), make_model(1)
    optimizer, twin = (METHODS[method](each, adamw(each)) for each in (model, plain))
    train(optimizer, model, model, range(2))
    optimizer.base.param_groups = [dict(group) for group in optimizer.base.param_groups]
    for key in optimizer._remembered:
        del optimizer.base.param_groups[0][key]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    train(optimizer, model, model, range(2, 3))
    scheduler.step()
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.state = copy.copy(optimizer.state)
    assert optimizer.base.param_groups is optimizer.param_groups
    assert optimizer.base.state is optimizer.state
    train(optimizer, model, model, range(3, 4))
    other = torch.optim.lr_scheduler.StepLR(twin, 1, gamma=0.1)
    train(twin, plain, plain, range(3))
    other.step()
    train(twin, plain, plain, range(3, 4))
    assert weights(model) == weights(plain)
    assert optimizer.num_steps == twin.num_steps


def test_a_group_that_was_added_is_missed_when_it_is_forgotten_later() -> None:
    model = make_model(1)
    first, *rest = model.parameters()
    optimizer = METHODS["GMP"](model, torch.optim.SGD(rest, lr=0.1))
    optimizer.add_param_group({"params": [first]})
    model.load_state_dict({n: p.clone() for n, p in model.state_dict().items()}, assign=True)
    optimizer.param_groups[0]["params"] = [*model.parameters()][1:]
    assert "lacks 1 parameter of the model, 'embed.weight'" in said(optimizer.step)


def test_a_group_may_be_dropped_with_its_state_left_behind() -> None:
    model = make_model(1)
    first, *rest = model.parameters()
    groups = [{"params": [first]}, {"params": rest}]
    optimizer = METHODS["ACDC"](model, torch.optim.AdamW(groups, lr=1e-2))
    train(optimizer, model, model, range(1))
    first.requires_grad_(False)
    optimizer.param_groups.pop(0)
    train(optimizer, model, model, range(1, 3))
    assert optimizer.num_steps == 3


def test_groups_may_be_made_anew_one_by_one() -> None:
    model = make_model(1)
    first, *rest = model.parameters()
    optimizer = METHODS["GMP"](model, adamw(model))
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": rest})
    optimizer.add_param_group({"params": [first], "weight_decay": 0.0})
    train(optimizer, model, model, range(2))
    assert optimizer.num_steps == 2


def test_a_state_is_read_whatever_the_model_has_become() -> None:
    model = make_model(1)
    optimizer = METHODS["ACDC"](model, adamw(model))
    train(optimizer, model, model, range(2))
    before = len(optimizer.state_dict()["state"])
    model.head = nn.Linear(10, 13)
    assert len(optimizer.state_dict()["state"]) == before
    assert "lacks 1 parameter of the model, 'head.weight'" in said(optimizer.step)


def test_a_group_may_move_to_another_optimizer() -> None:
    model = make_model(1)
    first, *rest = model.parameters()
    base = torch.optim.AdamW([{"params": rest}, {"params": [first]}], lr=1e-2)
    optimizer = METHODS["ACDC"](model, base)
    train(optimizer, model, model, range(1))
    other = torch.optim.SGD(optimizer.param_groups.pop()["params"], lr=0.1)
    train(optimizer, model, model, range(1, 3))
    other.step()
    assert optimizer.num_steps == 3


def test_what_joins_the_model_later_is_named() -> None:
    model = make_model(1)
    optimizer = METHODS["GMP"](model, adamw(model))
    model.blocks.append(make_model(2).blocks[0])
    optimizer.add_param_group({"params": [*model.blocks[2].parameters()]})
    with pytest.warns(UserWarning, match=r"blocks\.2\.qkv\.weight, .* came after GMP was made"):
        optimizer.step(closure_of(model, model, 0))


def test_parameters_of_another_time_beside_lacking_ones_are_named() -> None:
    model = make_model(1)
    first, *rest = model.parameters()
    base = torch.optim.SGD([nn.Parameter(first.detach().clone()), *rest], lr=0.1)
    said = "has 1 parameter that the model does not have, and lacks 1 that it trains, 'embed"
    with pytest.warns(UserWarning, match=said):
        METHODS["ACDC"](model, base)


class _Around(torch.optim.Optimizer):
    """As accelerate's: a torch.optim.Optimizer by name alone."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state


def test_a_base_that_is_none_of_its_own_is_refused() -> None:
    model = make_model(1)
    with pytest.raises(ValueError, match="a _Around, which only wraps another one: give that one"):
        METHODS["SAM"](model, _Around(adamw(model)))


@pytest.mark.parametrize("method", [CrAM, SAM, ACDC, GMP])
def test_an_argument_that_is_none_is_refused_with_those_that_are(method: Any) -> None:
    model = make_model(1)
    with pytest.raises(TypeError, match=r"has no argument 'sparse': choose among model, base"):
        method(model, adamw(model), sparse=0.5)


class Unsettable(torch.optim.SGD):
    """Its momentum is of a class that nothing can be copied to."""

    class Momentum(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            raise NotImplementedError(func)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["exp_avg"] = torch.ones(1).as_subclass(self.Momentum)


def differing(*_: Any, **__: Any) -> bool:
    raise RuntimeError("ranks differ")


REFUSALS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], object]] = {
    "pattern of ACDC": lambda m, base: ACDC(m, base, schedule=9, target="4:8", prunable=["*"]),
    "pattern of CrAM": lambda m, base: CrAM(m, base, sparsity="5:7"),
    "begins sparse": lambda m, base: ACDC(
        m, base, schedule=ACDCSchedule(steps=9, warmup=0, phase=2, last_dense=2, last_sparse=2)
    ),
    **{f"ranks that differ, {name}": METHODS[name] for name in ("CrAM", "ACDC", "GMP")},
    "state": lambda m, base: ACDC(m, base, schedule=9),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_leaves_the_base_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def marks() -> Any:
        hooks = {key: [*value] for key, value in vars(base).items() if key.endswith("_hooks")}
        groups = [{n: v for n, v in g.items() if n != "params"} for g in base.param_groups]
        return groups, hooks, len(base.state), base.defaults

    model = make_model(1)
    base = Unsettable(model.parameters(), lr=0.1) if name == "state" else adamw(model)
    if name.startswith("ranks"):
        monkeypatch.setattr("qsdp.methods.construct_on_all_ranks.meet", differing)
    before = copy.deepcopy(marks())
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        REFUSALS[name](model, base)
    assert marks() == before, refusal  # while the exception holds what was refused
