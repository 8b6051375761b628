"""First moments under AC/DC, whatever class and name an optimizer gives them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qsdp import checkpoint
from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.gmp.optimizer import GMP
from qsdp.methods.gmp.schedule import GMPSchedule
from tests.support.momentum import SCHEDULE, Halves, KnowsNothing, KnowsZero, Momentum, values_of


def make(shards: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    if shards:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def take_step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()


def assert_lifting_forgets(model: nn.Module, optimizer: ACDC, name: str) -> None:
    """Over all phases: first moments are zero when masks are lifted, and at no other time."""
    num_lifts = 0
    for step in range(SCHEDULE.steps):
        take_step(model, optimizer)
        moments = [values_of(state[name]) for state in optimizer.state.values()]
        is_lifted = SCHEDULE.is_compressed(step) and not SCHEDULE.is_compressed(step + 1)
        num_lifts += is_lifted
        assert any(moment.any() for moment in moments) != is_lifted
    assert num_lifts


@pytest.mark.usefixtures("gloo_of_one")
@pytest.mark.parametrize("kind", [Halves, KnowsZero])
@pytest.mark.parametrize("shards", [False, True], ids=["plain", "sharded"])
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_diff", "momentum_buffer", "state1"])
def test_first_moments_are_zero_whatever_they_are_of(
    name: str, shards: bool, kind: type[Halves], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Momentum, "kind", kind)
    monkeypatch.setattr(Momentum, "name", name)
    model = make(shards)
    base = Momentum(model.parameters())
    with warnings.catch_warnings(action="error"):
        optimizer = ACDC(model, base, schedule=SCHEDULE, prunable=["*.weight"])
        assert_lifting_forgets(model, optimizer, name)


def test_a_class_that_cannot_be_zeroed_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Momentum, "kind", KnowsNothing)
    model = make()
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="Momentum keeps exp_avg as KnowsNothing, which cannot be"):
        ACDC(model, Momentum(model.parameters()), schedule=SCHEDULE, prunable=["*.weight"])
    assert torch.equal(before, torch.random.get_rng_state())
    gradual = GMPSchedule(steps=12, sparsity=0.5, initial=0.1, start=1, every=2, end=9)
    optimizer = GMP(
        model, Momentum(model.parameters()), schedule=gradual, prunable=["*.weight"]
    )  # which lifts no mask
    for _ in range(12):
        take_step(model, optimizer)


def test_one_that_shows_only_later_is_refused_before_anything_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Momentum, "kind", KnowsNothing)

    class Secretive(Momentum):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model.parameters())

    model = make()
    base = Secretive(model)
    optimizer = ACDC(model, base, schedule=SCHEDULE, prunable=["*.weight"])
    take_step(model, optimizer)
    with pytest.raises(ValueError, match="cannot be set to zero"):
        take_step(model, optimizer)
    assert optimizer.num_steps == 1


def test_momentum_under_another_name_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Momentum, "name", "ema of gradients")
    model = make()
    optimizer = ACDC(model, Momentum(model.parameters()), schedule=SCHEDULE, prunable=["*.weight"])
    take_step(model, optimizer)
    said = "ACDC does not know ema of gradients of the state of Momentum, and leaves it"
    with pytest.warns(UserWarning, match=re.escape(said)):
        take_step(model, optimizer)
    with warnings.catch_warnings(action="error"):
        take_step(model, optimizer)


@pytest.mark.parametrize(
    "base",
    [
        *(torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Adam),
        *(torch.optim.AdamW, torch.optim.Adamax, torch.optim.ASGD, torch.optim.NAdam),
        *(torch.optim.RAdam, torch.optim.Rprop, torch.optim.SGD),
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
)
def test_the_state_of_torchs_own_optimizers_is_known(base: Any) -> None:
    model = make()
    with warnings.catch_warnings(action="error"):
        optimizer = ACDC(model, base(model.parameters()), schedule=SCHEDULE, prunable=["*.weight"])
        for _ in range(2):
            take_step(model, optimizer)


@pytest.mark.usefixtures("gloo_of_one")
@pytest.mark.parametrize("shards", [False, True], ids=["plain", "sharded"])
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path: Path, shards: bool) -> None:
    model = make(shards)
    optimizer = Momentum(model.parameters())
    take_step(model, optimizer)
    said = r"optimizer\.state\.0\.weight\.exp_avg is or holds an object .*Halves\) that could only"
    with pytest.raises(ValueError, match=said):
        checkpoint.save(tmp_path, 1, model, optimizer, {})
    assert checkpoint.latest(tmp_path) is None
