"""What ``qsdp.install`` does not support, and what FSDP2 is told by hand, is refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import qsdp
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.running import Run


def _install_twice() -> None:
    model = shard(make_model())
    qsdp.install(model)
    qsdp.install(model)


def _install_on_a_part_then_the_whole() -> None:
    model = shard(make_model())
    qsdp.install(model.blocks[1])
    qsdp.install(model)


def _install_without_fsdp() -> None:
    qsdp.install(make_model())


def _install_with_offloading() -> None:
    qsdp.install(shard(make_model(), offload_policy=CPUOffloadPolicy(pin_memory=False)))


def _install_with_tensor_parallelism() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = make_model(hidden=6)
    parallelize_module(model.blocks[0].mlp, mesh["tensor"], {"up": ColwiseParallel()})
    qsdp.install(shard(model, mesh=mesh["data"]))


def _install_with_float64() -> None:
    qsdp.install(shard(make_model().double()))


def _install_with_float64_reduce() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    qsdp.install(shard(make_model(), mp_policy=policy))


def _install_with_two_meshes() -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = mesh._flatten("whole")
    model = make_model()
    experts = {id(p) for p in model.blocks[0].mlp.parameters()}
    narrow = ShardPlacementResult(Shard(0), FSDPMeshInfo(mesh["b"], shard_mesh_dim=0))
    wide = ShardPlacementResult(Shard(0), FSDPMeshInfo(whole, shard_mesh_dim=0))
    fully_shard(
        model, mesh=whole, shard_placement_fn=lambda p: narrow if id(p) in experts else wide
    )
    qsdp.install(model)


def _install_with_a_policy_for_nothing() -> None:
    qsdp.install(shard(make_model()), qsdp.QSDPConfig(policy=(("*.no_such.weight", 4),)))


def _install_with_a_budget_below_two_bits() -> None:
    qsdp.install(shard(make_model()), qsdp.QSDPConfig(budget=2.2))


def _install_with_a_budget_that_embeddings_take() -> None:
    qsdp.install(shard(make_model()), qsdp.QSDPConfig(budget=4, embedding_bits=8))


def _install_with_a_budget_for_raw_values() -> None:
    qsdp.install(shard(make_model()), qsdp.QSDPConfig(budget=8, policy=(("*", 32),)))


def _install_with_a_budget_for_bits_of_choice() -> None:
    config = qsdp.QSDPConfig(budget=8, weight_bits=32, grad_bits=16, embedding_bits=2)
    qsdp.install(shard(make_model()), config)


def _install_with_a_dict() -> None:
    qsdp.install(shard(make_model()), {"weight_bits": 8})  # type: ignore[arg-type]


def _refusal(function: Callable[[], None]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("function", "ranks", "words"),
    [
        (_install_twice, 2, "call handle.remove() first"),
        (_install_on_a_part_then_the_whole, 2, "call handle.remove() first"),
        (_install_without_fsdp, 1, "call fully_shard before"),
        (_install_with_offloading, 2, "CPUOffloadPolicy"),
        (_install_with_tensor_parallelism, 4, "tensor parallelism"),
        (_install_with_float64, 2, "float64"),
        (_install_with_a_policy_for_nothing, 2, "matches no parameter"),
        (_install_with_a_budget_below_two_bits, 2, "the budget is 2.2 bits a value, but weights"),
        (_install_with_a_budget_that_embeddings_take, 2, "the budget is 4 bits a value, but"),
        (_install_with_a_budget_for_raw_values, 2, "there is nothing to allot"),
        (_install_with_a_budget_for_bits_of_choice, 2, "there is nothing to allot"),
        (_install_with_a_dict, 2, "give a qsdp.QSDPConfig"),
        (_install_with_float64_reduce, 2, "float64"),
        pytest.param(
            _install_with_two_meshes,
            4,
            "2 parameter meshes",
            marks=pytest.mark.skipif(
                torch.__version__ < "2.13", reason="per-parameter meshes came with torch 2.13"
            ),
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    run: Run, function: Callable[[], None], ranks: int, words: str
) -> None:
    for message in run(ranks, _refusal, function):
        assert words in message
        assert "\n" not in message


def _disagree(configs: list[dict[str, Any]], steps: list[int]) -> str:
    model = shard(make_model())
    rank = dist.get_rank()
    try:
        handle = qsdp.install(model, qsdp.QSDPConfig(**configs[rank]))
        handle.load_state_dict({**handle.state_dict(), "step": steps[rank]})
        torch.autograd.backward(model(*make_batch(model, 1)))
    except RuntimeError as error:
        return str(error)
    return "trained on garbage"


@pytest.mark.parametrize(
    "other",
    [
        {"weight_bits": 4},
        {"grad_bits": 4},
        {"bucket_size": 8},
        {"rounding": "dither"},
        {"seed": 1},
        {"policy": (("*norm*", 4),)},
        "step",
    ],
    ids=str,
)
def test_ranks_that_disagree_raise(run: Run, other: Any) -> None:
    configs, steps = [{}, {}, {}], [0, 0, 0]
    odd = random.randrange(3)
    if other == "step":
        steps[odd] = 5
    else:
        configs[odd] = other
    for message in run(3, _disagree, configs, steps):
        assert "every rank" in message
        assert "\n" not in message


def _gradient_set_by_hand() -> str:
    model = shard(make_model(unused=True), nested=False)
    handle = qsdp.install(model)
    loss = model(*make_batch(model, 1))
    weight = next(
        tensor
        for group in handle._groups
        for tensor in group.unsharded_parameters()
        if tensor is not None and tensor.shape == (3, 10)
    )
    weight.grad = torch.zeros_like(weight)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "reduced"


def test_a_gradient_that_is_set_by_hand_is_told_of(run: Run) -> None:
    for message in run(2, _gradient_set_by_hand):
        assert "let autograd bring its gradients" in message
