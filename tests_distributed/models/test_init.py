"""Promises of the models that hold under FSDP2: a sharded model is the plain one, in slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from qsdp.common.sharding import local_slices
from qsdp.models.generate import generate
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.init import init_weights
from qsdp.models.gpt2.model import GPT
from qsdp.models.huggingface.weights import (
    export_huggingface,
    load_huggingface,
    load_huggingface_weights,
)
from tests_distributed.support.helpers import full_grads, full_state, shard
from tests_distributed.support.running import Run

# Rows that no world size divides, norms shorter than a world of 4 splits evenly, and an embedding
# of several generator blocks, whose borders the shards cross.
SIZES: dict[str, Any] = {
    "vocab_size": 50_021,
    "num_layers": 2,
    "num_heads": 2,
    "width": 10,
    "context": 3,
}


def _plain(tie_weights: bool) -> GPT:
    model = GPT(GPTConfig(**SIZES, tie_weights=tie_weights))
    init_weights(model, 7)
    return model


def _sharded(tie_weights: bool, meta: bool) -> GPT:
    with torch.device("meta" if meta else "cpu"):
        model = GPT(GPTConfig(**SIZES, tie_weights=tie_weights))
    shard(model)
    if meta:
        model.to_empty(device="cpu")
    return model


def _initialised(tie_weights: bool, meta: bool) -> tuple[dict[str, Tensor], list[int]]:
    model = _sharded(tie_weights, meta)
    init_weights(model, 7)
    return full_state(model), [_local(p).numel() for p in model.parameters()]


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def _slices(axes: tuple[int, ...], shard_dim: int) -> None:
    mesh = init_device_mesh("cpu", axes, mesh_dim_names=("replicate", "shard")[-len(axes) :])
    model = nn.Linear(4, 8)
    with torch.no_grad():
        model.weight.copy_(torch.arange(32.0).view(8, 4))
        model.bias.copy_(torch.arange(8.0))
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    fully_shard(
        model,
        mesh=mesh,
        shard_placement_fn=lambda parameter: Shard(shard_dim) if parameter.ndim == 2 else None,
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(_local(parameter), whole[name][local_slices(parameter)])


def _loaded(folder: str) -> dict[str, Tensor]:
    model = _sharded(tie_weights=True, meta=True)
    load_huggingface_weights(model, folder)
    return full_state(model)


def _exported(folder: str) -> None:
    model = _sharded(tie_weights=True, meta=True)
    init_weights(model, 7)
    export_huggingface(model, folder)


def _generated(prompts: Tensor) -> Tensor:
    model = _sharded(tie_weights=True, meta=True)
    init_weights(model, 7)
    return generate(model, prompts, 4, seed=1)


def _loss_and_gradients(tie_weights: bool, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    model = _sharded(tie_weights, meta=True)
    init_weights(model, 7)
    _, loss = model(tokens[dist.get_rank()], tokens[dist.get_rank()])
    loss.backward()
    return loss.item(), full_grads(model)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("meta", [True, False])
def test_initial_weights_do_not_depend_on_the_sharding(
    run: Run, world_size: int, tie_weights: bool, meta: bool
) -> None:
    expected = dict(_plain(tie_weights).named_parameters())
    results = run(world_size, _initialised, tie_weights, meta)
    for state, _ in results:
        torch.testing.assert_close(
            state, {k: v.detach() for k, v in expected.items()}, rtol=0, atol=0
        )
    if world_size == 4:
        assert any(0 in sizes for _, sizes in results), "empty shards were among them"


@pytest.mark.parametrize(("axes", "shard_dim"), [((3,), 0), ((2,), 1), ((2, 2), 0), ((2, 2), 1)])
def test_local_slices_are_where_fsdp2_puts_the_shards(
    run: Run, axes: tuple[int, ...], shard_dim: int
) -> None:
    run(torch.Size(axes).numel(), _slices, axes, shard_dim)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_sharded_step_has_the_gradients_of_the_plain_one(run: Run, tie_weights: bool) -> None:
    tokens = torch.randint(SIZES["vocab_size"], (3, 2, 3))
    model = _plain(tie_weights)
    losses = [model(batch, batch)[1] for batch in tokens]
    torch.stack(losses).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for rank, (loss, grads) in enumerate(run(3, _loss_and_gradients, tie_weights, tokens)):
        assert loss == pytest.approx(losses[rank].item(), rel=1e-6)
        torch.testing.assert_close(grads, expected)


def test_a_sharded_model_samples_what_the_plain_one_does(run: Run) -> None:
    prompts = torch.randint(SIZES["vocab_size"], (2, 2))
    expected = generate(_plain(True), prompts, 4, seed=1)
    for sampled in run(2, _generated, prompts):
        assert torch.equal(sampled, expected)


def test_checkpoints_load_into_shards_and_are_exported_from_them(run: Run, tmp_path: Path) -> None:
    plain = _plain(True)
    export_huggingface(plain, tmp_path / "plain")
    expected = {name: p.detach() for name, p in plain.named_parameters()}
    for state in run(3, _loaded, str(tmp_path / "plain")):
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
    run(3, _exported, str(tmp_path / "sharded"))
    again = load_huggingface(tmp_path / "sharded")
    torch.testing.assert_close(dict(again.named_parameters()), expected, rtol=0, atol=0)
