"""Ranks that own different experts: norms are of all experts and the rest."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from qsdp.methods.clip_grad import clip_grad_norm_
from qsdp.methods.grad_norm import global_grad_norm
from tests_distributed.support.expert_methods import NAMES
from tests_distributed.support.experts import LAYOUTS, Layout, backward_on_rank, values_of
from tests_distributed.support.running import Run, selection

Parts = dict[str, Tensor | None]


def _grads(parameters: dict[str, Any]) -> Parts:
    """This rank's part of each."""
    return {
        name: None if p.grad is None else values_of({name: p.grad})[name]
        for name, p in parameters.items()
    }


def _norms(layout: Layout, lacks_grads: int | None) -> dict[str, Any]:
    """With a plain parameter beside, and gradients that rank ``lacks_grads`` has not."""
    model = layout.shard()
    backward_on_rank(model, 0)
    beside = nn.Parameter(torch.ones(7))
    beside.grad = torch.linspace(-0.1, 0.2, 7)
    parameters = {**dict(model.named_parameters()), "beside": beside}
    if dist.get_rank() == lacks_grads:
        for name, parameter in parameters.items():
            parameter.grad = None if name != "beside" else parameter.grad
    before = _grads(parameters)
    norm = global_grad_norm(parameters.values(), loss=float(dist.get_rank()))  # a loss adds nothing
    returned = clip_grad_norm_(parameters.values(), 0.01)
    after, clipped = _grads(parameters), global_grad_norm(parameters.values())
    poisoned = []
    for rank, value in ((0, math.inf), (layout.ranks - 1, math.nan)):
        weight = model.blocks[1].expert.up.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        good = weight.grad.to_local().clone()
        if dist.get_rank() == rank:
            weight.grad.to_local()[0, 0] = value
        poisoned.append(global_grad_norm(parameters.values()))
        weight.grad.to_local().copy_(good)
        loss = torch.tensor(value if dist.get_rank() == rank else 1.0)
        poisoned.append(global_grad_norm(parameters.values(), loss=loss))
    return {
        "norms": (norm, returned, clipped),
        "before": before,
        "after": after,
        "poisoned": poisoned,
    }


@selection(
    "layout, lacks_grads",
    [
        *(("two of two", None), ("replicas", "first")),
        *(("a rank each", None), ("one and two", "last")),
    ],
    NAMES,
    (None, "first", "last"),
)
def test_the_norm_is_one_number_of_all_experts_and_the_rest(
    run: Run, layout: str, lacks_grads: str | None
) -> None:
    chosen = LAYOUTS[layout]
    rank = {None: None, "first": 0, "last": chosen.ranks - 1}[lacks_grads]
    found = run(chosen.ranks, _norms, chosen, rank)
    squares = [
        grad.double().square().sum().item()
        for rank, each in enumerate(found)
        for name, grad in each["before"].items()
        if grad is not None and (chosen.counts(name, rank) if name != "beside" else rank == 0)
    ]
    expected = math.sqrt(sum(squares))
    for each in found:
        assert each["norms"] == found[0]["norms"]
        for name, grad in each["after"].items():
            if grad is not None:
                whole = each["before"][name] * (0.01 / (expected + 1e-6))
                torch.testing.assert_close(grad, whole, rtol=1e-5, atol=0)
        assert not any(math.isfinite(norm) for norm in each["poisoned"])
    norm, returned, clipped = found[0]["norms"]
    assert norm == returned == pytest.approx(expected, rel=1e-12)
    assert clipped == pytest.approx(0.01, rel=1e-3)


def _rows_and_columns() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("down", "across"))
    parameters = []
    for axis in ("down", "across"):
        values = torch.ones(2, 3)
        parameters.append(nn.Parameter(DTensor.from_local(values, mesh[axis], [Shard(0)])))
        parameters[-1].grad = DTensor.from_local(values, mesh[axis], [Shard(0)])
    said = []
    for call in (global_grad_norm, lambda each: clip_grad_norm_(each, 1.0)):
        try:
            said.append(f"not refused: {call(parameters)}")
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_meshes_none_of_which_holds_the_others_are_refused_by_their_ranks(run: Run) -> None:
    for said in run(4, _rows_and_columns):
        for message in said:
            assert "not refused" not in message
            assert "\n" not in message
            numbers = {int(number) for number in re.findall(r"\d+", message)}
            assert any(numbers >= row for row in ({0, 1}, {2, 3})), message
            assert any(numbers >= column for column in ({0, 2}, {1, 3})), message
