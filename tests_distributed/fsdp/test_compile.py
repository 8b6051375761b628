"""Blocks compiled by torch.compile train under qsdp as they do without the compiler."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import qsdp
from tests_distributed.support.helpers import Toy, make_batch, make_model, shard
from tests_distributed.support.running import Run

PRELOADED = ["torch._dynamo.backends.common", "torch._functorch.compile_utils"]
STEPS = 2


def _compile(model: Toy, **options: Any) -> None:
    for block in model.blocks:
        block.compile(**options)


def _wrap(model: Toy, **options: Any) -> None:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, **options)


def _make(order: str | None, options: dict[str, Any], backend: str, fullgraph: bool) -> Any:
    """A sharded model with qsdp, its blocks compiled at the moment that ``order`` says."""
    how = {"backend": backend, "fullgraph": fullgraph}
    model: Any = make_model(3, **options)
    if order == "compiled, then sharded":
        _compile(model, **how)
    if order == "wrapped, then sharded":
        _wrap(model, **how)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        shard(model, nested=False)
    if order == "sharded, then compiled":
        _compile(model, **how)
    if order == "sharded, then wrapped":
        _wrap(model, **how)
    policy = (("blocks.0.qkv.weight", 4),)
    config = qsdp.QSDPConfig(bucket_size=64, policy=policy)
    handle = qsdp.install(model, config)
    row = next(row for row in handle.report().rows if row.name == "blocks.0.qkv.weight")
    assert row.weight == "4 bits"
    if order == "installed, then compiled":
        _compile(model, **how)
    return model


def _gathered(model: nn.Module) -> dict[str, Tensor]:
    """The weights that this rank computes with."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _train(
    order: str | None, options: dict[str, Any], backend: str, fullgraph: bool
) -> tuple[list[float], dict[str, Tensor], int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = _make(order, options, backend, fullgraph)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True
    )
    losses = []
    for step in range(STEPS):
        loss = model(*make_batch(model, step))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return losses, _gathered(model), num_graphs


def _assert_alike(eager: list[Any], compiled: list[Any], num_ranks: int) -> None:
    assert len(eager) == len(compiled) == num_ranks
    for (losses, _, no_graphs), (found, _, num_graphs) in zip(eager, compiled, strict=True):
        assert no_graphs == 0
        assert num_graphs > 0, "nothing was compiled"
        assert found == pytest.approx(losses, abs=1e-4)
    _, first, _ = compiled[0]
    for _, weights, _ in compiled[1:]:
        torch.testing.assert_close(weights, first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("order", "fullgraph"),
    [
        ("compiled, then sharded", True),
        pytest.param("wrapped, then sharded", True, marks=pytest.mark.heavy),
        pytest.param("sharded, then compiled", True, marks=pytest.mark.heavy),
        pytest.param("sharded, then compiled", False, marks=pytest.mark.heavy),
        ("sharded, then wrapped", True),
        ("installed, then compiled", True),
    ],
)
def test_compiled_blocks_train_as_eager_ones(run: Run, order: str, fullgraph: bool) -> None:
    options = {"frozen": True}
    eager = run(2, _train, None, options, "eager", False)
    _assert_alike(eager, run(2, _train, order, options, "aot_eager", fullgraph), 2)


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"unused": True, "tied": True}])
def test_compiled_blocks_train_with_what_fsdp2_offers_besides(
    run: Run, options: dict[str, Any]
) -> None:
    eager = run(2, _train, None, options, "eager", False)
    order = "sharded, then compiled"
    _assert_alike(eager, run(2, _train, order, options, "aot_eager", False), 2)


@pytest.mark.heavy  # its C++ is compiled for half a minute
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_generated_kernels_train_as_eager_ones(run: Run) -> None:
    eager = run(2, _train, None, {}, "eager", False)
    compiled = run(2, _train, "compiled, then sharded", {}, "inductor", False)
    _assert_alike(eager, compiled, 2)
