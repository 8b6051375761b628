"""Tensor parallelism: what is on one axis of the mesh alone is equal along the other."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import qsdp
from qsdp.checkpoint import save
from qsdp.methods.clip_grad import clip_grad_norm_
from qsdp.methods.grad_norm import global_grad_norm
from qsdp.sparsity.masks import magnitude_masks
from tests.support.cram_reference import top_k_masks
from tests_distributed.support.expert_methods import METHODS
from tests_distributed.support.experts import train
from tests_distributed.support.helpers import Block, ToyConfig
from tests_distributed.support.running import Run

PRELOADED = ["torch.distributed.tensor.parallel"]


class Rows(nn.Module):
    """Blocks whose last layer is cut by its input dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(ToyConfig()) for _ in range(2))

    def forward(self, x_BTC: Tensor) -> Tensor:
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return x_BTC.square().mean()


def _rows() -> Rows:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Rows()
    for block in model.blocks:
        down = block.get_submodule("mlp.down")
        for parameter in down.parameters():
            parameter.data.mul_(2)
    return model


def _row_backward(model: nn.Module, places: list[int], step: int) -> Tensor:
    total = torch.zeros(())
    for place in places:
        generator = torch.Generator().manual_seed(100 * step + place)
        loss = model(torch.randn(3, 4, 10, generator=generator)) / len(places)
        loss.backward()
        total += loss.detach()
    return total


ROW_METHODS = ("CrAM", "GMP by layer")


def _two_axes(folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    place = mesh.get_local_rank("dp")

    def sharded() -> Any:
        model = _rows()
        for block in model.blocks:
            plan = RowwiseParallel(input_layouts=Replicate())
            parallelize_module(block.get_submodule("mlp.down"), mesh["tp"], plan)
            fully_shard(block, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    model = sharded()
    assert {len(p.device_mesh.shape) for p in model.parameters()} == {1, 2}
    _row_backward(model, [place], 0)
    norms = [global_grad_norm(model.parameters()), clip_grad_norm_(model.parameters(), 1e-3)]
    masks = _wholes(magnitude_masks, model)
    try:
        save(folder, 1, model, None, {})
    except (ValueError, RuntimeError) as error:
        masks["said"] = str(error)
    trails = {}
    for name in ROW_METHODS:
        model = sharded()
        trail = train(METHODS[name], model, partial(_row_backward, model, [place]))
        trail.values = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
        trail.zeros = []
        trails[name] = trail
    return {"norms": norms, "masks": masks, "trails": trails}


def _wholes(find: Any, model: nn.Module) -> dict[str, Any]:
    """Masks of the parameters' own kind, made whole."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    wholes = {}
    for name, mask in find(parameters, 0.5).items():
        values: Any = parameters[name]
        local = mask.to(torch.uint8)
        whole = local
        if isinstance(values, DTensor):
            whole = DTensor.from_local(
                local,
                values.device_mesh,
                values.placements,
                shape=values.shape,
                stride=values.stride(),
            ).full_tensor()
        wholes[name] = whole.bool()
    return wholes


def test_under_tensor_parallelism_what_is_equal_along_an_axis_counts_once(
    run: Run, tmp_path: Path
) -> None:
    results = run(4, _two_axes, tmp_path)
    plain = _rows()
    _row_backward(plain, [0, 1], 0)
    grads = [p.grad for p in plain.parameters() if p.grad is not None]
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    names, tensors = zip(*plain.named_parameters(), strict=True)
    total = sum(tensor.numel() for tensor in tensors)
    masks = top_k_masks([t.detach() for t in tensors], total - round(0.5 * total))
    trails = {}
    for method in ROW_METHODS:
        model = _rows()
        backward = partial(_row_backward, model, [0, 1])
        trails[method] = train(METHODS[method], model, backward)
    for found in results:
        assert found["norms"] == results[0]["norms"]
        assert found["norms"] == pytest.approx([norm, norm], rel=1e-5)
        assert "said" not in found["masks"]
        for name, mask in zip(names, masks, strict=True):
            assert torch.equal(found["masks"][name], mask), name
        for method, trail in found["trails"].items():
            assert trail.norms == pytest.approx(trails[method].norms, abs=1e-6)
            for name, value in trail.values.items():
                expected = trails[method].values[name]
                assert torch.equal(value == 0, expected == 0), (method, name)
                torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def _one_data_parallel_rank() -> list[float]:
    """Two ranks of tensor parallelism: what is on the mesh's other axis stands on one rank."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    cut, equal = torch.full((2, 3), 2.0), torch.full((4, 5), 3.0)
    both = nn.Parameter(DTensor.from_local(cut, mesh, [Shard(0), Shard(1)]))
    both.grad = both.detach().clone()
    one = nn.Parameter(DTensor.from_local(equal, mesh["dp"], [Shard(0)]))
    one.grad = one.detach().clone()
    masks = magnitude_masks({"both": both.detach(), "one": one.detach()}, 0.5)
    return [global_grad_norm([both, one]), *(float(mask.sum()) for mask in masks.values())]


def test_a_rank_alone_on_the_data_axis_shares_its_weights_with_the_others(run: Run) -> None:
    for norm, both, one in run(2, _one_data_parallel_rank):
        assert norm == pytest.approx(math.sqrt(2 * 6 * 4 + 20 * 9))
        assert (both, one) == (0, 16)


def _norm_of_experts_along_tp() -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({"attn": nn.Linear(8, 8, bias=False), "expert": nn.Linear(8, 8)})
    model["expert"].weight.data.mul_(1 + mesh["tp"].get_local_rank())
    parallelize_module(model["attn"], mesh["tp"], RowwiseParallel())
    for module in model.values():
        fully_shard(module, mesh=mesh["dp"])
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    return qsdp.clip_grad_norm_(model.parameters(), 1e9)


def test_what_differs_along_an_axis_of_tensor_parallelism_still_gives_one_norm(run: Run) -> None:
    assert len({*run(4, _norm_of_experts_along_tp)}) == 1
