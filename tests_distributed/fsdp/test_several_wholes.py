"""Models of several wholes, and settings of FSDP2 that one rank alone changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.utils.checkpoint import checkpoint

import qsdp
from tests_distributed.support.fsdp2_switches import on_all_modules
from tests_distributed.support.helpers import make_batch, make_model
from tests_distributed.support.running import Run
from tests_distributed.support.two_replicas import Stage, Two, refusal_of


def _wholes() -> Any:
    """Layers that FSDP2 takes for models of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    for layer in model:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return model


def _a_later_whole(is_odd: bool) -> None:
    model = _wholes()
    qsdp.install(model)
    if is_odd:
        model[2].set_custom_all_gather(DefaultAllGather())
    model(torch.ones(3, 6))


def _a_part_on_a_mesh_of_its_own(is_odd: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model: Any = Two()
    fully_shard(model.first, mesh=mesh["shard"])
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    qsdp.install(model)
    if is_odd:
        model.first.set_custom_reduce_scatter(DefaultReduceScatter())
    model(torch.ones(3, 6))


def _a_hook(is_odd: bool) -> None:
    stage = Stage()
    if is_odd:
        stage.model.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    stage.train(0, averages=False)
    stage.train(1, averages=True)


def _alone(work: Callable[[bool], None]) -> str:
    return refusal_of(lambda: work(dist.get_rank() == 0))


@pytest.mark.parametrize(
    ("ranks", "work", "sentence"),
    [
        (2, _a_later_whole, "set_custom_all_gather was called"),
        (4, _a_part_on_a_mesh_of_its_own, "set_custom_reduce_scatter was called"),
        (4, _a_hook, "has a hook on its gradient"),
    ],
)
def test_what_one_rank_alone_is_refused_all_hear(
    run: Run, ranks: int, work: Any, sentence: str
) -> None:
    for rank, said in enumerate(run(ranks, _alone, work)):
        assert sentence in said
        assert rank == 0 or "rank 0 cannot do what the others do at a" in said


def _called_by_itself() -> str:
    model = make_model()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    qsdp.install(model)
    model(*make_batch(model, 0))
    on_all_modules("set_custom_all_gather", DefaultAllGather())(model)
    with torch.no_grad():
        return refusal_of(lambda: model.blocks[0](torch.ones(1, 2, 10)))


def test_a_part_that_is_called_by_itself_is_refused_too(run: Run) -> None:
    for said in run(2, _called_by_itself):
        assert "set_custom_all_gather was called" in said


# --- several wholes -----------------------------------------------------------------------------


def _edited_between_wholes() -> list[Tensor]:
    model = _wholes().requires_grad_(False)
    qsdp.install(model, qsdp.QSDPConfig(weight_bits=32, gather="once"))
    with torch.no_grad():
        model(torch.ones(3, 6))
        hidden = model[0](torch.ones(3, 6))
        model[2].bias.to_local().add_(1)
        return [model[2](hidden), model[2](hidden)]


def test_a_whole_sees_an_edit_that_came_after_the_call_of_another(run: Run) -> None:
    for first, again in run(2, _edited_between_wholes):
        assert torch.equal(first, again)


def _frozen_between_wholes(is_odd: bool) -> None:
    model = _wholes()
    qsdp.install(model, qsdp.QSDPConfig(gather="once"))
    model(torch.ones(3, 6))
    hidden = model[0](torch.ones(3, 6))
    if is_odd:
        model[2].weight.requires_grad_(False)
    model[2](hidden)


def test_a_whole_that_one_rank_alone_freezes_is_named(run: Run) -> None:
    for said in run(2, _alone, _frozen_between_wholes):
        assert "with frozen parameters" in said


def _in_one_backward(is_odd: bool, way: str) -> None:
    """Two wholes, of which one rank tells the first not to reduce."""
    model = _wholes()
    handle = qsdp.install(model)
    x_BC = torch.ones(3, 6, requires_grad=way == "recomputed")
    if way == "recomputed":
        first = checkpoint(model[0], x_BC, use_reentrant=True)
    elif way == "exact":
        with handle.exact():
            first = model[0](x_BC)
    else:
        first = model[0](x_BC)
    if way == "backward again":
        first.sum().backward(retain_graph=True)
    elif way == "older":
        model[1](x_BC).sum().backward()
    second = model[1](x_BC if way == "backward again" else first)
    if is_odd:
        model[0].set_requires_gradient_sync(False)
    (first + second).sum().backward()


@pytest.mark.parametrize("way", ["recomputed", "exact", "backward again", "older"])
def test_a_backward_pass_speaks_of_all_wholes_that_it_reaches(run: Run, way: str) -> None:
    for said in run(2, _alone, partial(_in_one_backward, way=way)):
        assert "at a backward pass with groups that are not reduced" in said
