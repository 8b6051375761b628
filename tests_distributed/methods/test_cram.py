"""CrAM over shards: steps of one process, exceptions, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qsdp.methods.clip_grad import clip_grad_norm_
from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.grad_norm import global_grad_norm
from tests_distributed.support.cram_steps import compare_with_one_process, mesh_over
from tests_distributed.support.helpers import full_state, make_batch, make_model, shard
from tests_distributed.support.running import Run, selection


def _compare_targets(first: int, toy_options: dict[str, Any]) -> None:
    for options in TARGETS[first::2]:
        compare_with_one_process("fsdp", toy_options, True, options)


def _fail_in_the_second_pass(where: str) -> None:
    """After the exception the weights are as before, and the next step is as if none had been."""
    model, twin = shard(make_model(seed=3)), shard(make_model(seed=3))
    optimizer = CrAM(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    undisturbed = CrAM(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2))
    before = full_state(model)
    calls = 0

    def fail(*_: Any) -> None:
        if calls == 2:
            raise LookupError("on purpose")

    if where == "forward":
        model.blocks[1].register_forward_pre_hook(fail)
    elif where == "backward":
        # Autograd carries the exception of a tensor hook through its engine.
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(fail)

        model.blocks[0].register_forward_hook(hook)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if where == "between micro-batches":
            model.set_requires_gradient_sync(False)
            model(*make_batch(model, seed=0)).backward()
            fail()
            model.set_requires_gradient_sync(True)
        loss = model(*make_batch(model, seed=0))
        loss.backward()
        if where == "end":
            fail()
        return loss.detach()

    with pytest.raises(LookupError):
        optimizer.step(closure)
    calls = 0  # disarms the hooks
    model.set_requires_gradient_sync(True)
    after = full_state(model)
    for name, value in after.items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name
    assert all(parameter.grad is None for parameter in model.parameters())

    for trained, chosen in ((model, optimizer), (twin, undisturbed)):

        def plain_closure(trained: Any = trained) -> Tensor:
            loss = trained(*make_batch(trained, seed=1))
            loss.backward()
            return loss.detach()

        chosen.step(plain_closure)
    torch.testing.assert_close(full_state(model), full_state(twin), rtol=0, atol=0)


def _bad_gradient_on_one_rank(bad_call: int) -> None:
    model = shard(make_model(seed=3))
    optimizer = CrAM(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    before = full_state(model)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = model(*make_batch(model, seed=0))
        loss.backward()
        grad = model.blocks[0].qkv.weight.grad
        if calls == bad_call and dist.get_rank() == 1:
            grad.to_local()[0, 0] = math.nan
        return loss.detach()

    optimizer.step(closure)
    assert calls == bad_call
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(full_state(model), before, rtol=0, atol=0)
    optimizer.step(closure)
    assert optimizer.skipped_steps == 1


def _refuse_weights_that_stay_gathered() -> None:
    model = shard(make_model())
    optimizer = CrAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.set_reshard_after_backward(False)
    with pytest.raises(RuntimeError, match="set_reshard_after_backward"):
        optimizer.step(lambda: pytest.fail("the closure must not run"))


def _refuse_parameters_from_before_the_sharding() -> None:
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    shard(model)
    with pytest.raises(ValueError, match="after sharding"):
        CrAM(model, base)


def _fresh_state_dict() -> None:
    model = shard(make_model())
    optimizer = CrAM(model, torch.optim.AdamW(model.parameters()))
    before = full_state(model)
    get_optimizer_state_dict(model, optimizer)
    torch.testing.assert_close(full_state(model), before, rtol=0, atol=0)


def _norms(hsdp: bool) -> tuple[float, float, float]:
    """The norm over shards, replicated and plain parameters together, and clipped."""
    world_size = dist.get_world_size()
    model = make_model(seed=2)
    ignored = {model.get_parameter("norm.weight"), model.get_parameter("blocks.0.qkv.weight")}
    mesh = mesh_over(hsdp)
    fully_shard(model.blocks[1], mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    # The same batch everywhere: what is not sharded then has the same gradient on every rank.
    model(*make_batch(model, seed=4, rank=0)).backward()
    parameters = list(model.parameters())
    assert {isinstance(p, DTensor) for p in parameters} == {False, True}
    norm = global_grad_norm(parameters)
    assert clip_grad_norm_(parameters, 0.1) == norm
    clipped = global_grad_norm(parameters)
    local = next(p for p in ignored if p.ndim == 2).grad
    assert local is not None
    if dist.get_rank() == world_size - 1:
        local[0, 0] = math.inf
    return norm, clipped, global_grad_norm(parameters)


TARGETS: list[dict[str, Any]] = [
    {"sparsity": ("2:4", "4:8", "1:4")},
    {"sparsity": "0.7+layer", "plus": False},
    {"sparsity": "0.5+block4", "normalize": True, "rho": 0.5},
    {"sparsity": "4bit"},
    {"sparsity": ("2:4+4bit", "0.5+4bit", "0.5+block4+layer+5bit")},
]
OPTIONS: dict[str, dict[str, Any]] = {
    "CrAM+": {},
    "CrAM": {"plus": False, "max_norm": 0.2},
    "normalized": {"normalize": True, "sparse_grad": False},
}


@selection(
    "world_size, reshard, tied, options",
    [
        (2, False, True, "CrAM"),
        (3, False, False, "normalized"),
        (4, True, True, "CrAM+"),
    ],
    [2, 3, 4],
    [True, False],
    [False, True],
    tuple(OPTIONS),
)
def test_a_sharded_step_is_that_of_one_process(
    run: Run, world_size: int, reshard: bool, tied: bool, options: str
) -> None:
    toy = {"tied": tied}
    run(world_size, compare_with_one_process, "fsdp", toy, reshard, OPTIONS[options])


@pytest.mark.parametrize(
    "toy_options", [{"frozen": True, "unused": True}, {"checkpointing": True}], ids=str
)
def test_frozen_unused_and_recomputed_parameters_are_no_exception(
    run: Run, toy_options: dict[str, Any]
) -> None:
    run(3, compare_with_one_process, "fsdp", toy_options, True, {"max_norm": 0.2})


@selection(
    "world_size, first, conv1d",
    [(2, 1, True), (3, 0, False)],
    [2, 3, 4],
    [0, 1],
    [False, True],
)
def test_every_target_is_compressed_to_as_in_one_process(
    run: Run, world_size: int, first: int, conv1d: bool
) -> None:
    run(world_size, _compare_targets, first, {"width": 16, "hidden": 8, "conv1d": conv1d})


def test_replicas_take_the_same_step(run: Run) -> None:
    run(4, compare_with_one_process, "hsdp", {"tied": True}, True, {})


@pytest.mark.parametrize("kind", ["ddp", "ddp, a bucket a parameter"])
def test_under_ddp_the_first_gradient_survives_the_second_pass(run: Run, kind: str) -> None:
    run(2, compare_with_one_process, kind, {"tied": True}, True, {})


@pytest.mark.parametrize("where", ["forward", "backward", "between micro-batches", "end"])
def test_an_exception_in_the_second_pass_leaves_no_trace(run: Run, where: str) -> None:
    run(2, _fail_in_the_second_pass, where)


@pytest.mark.parametrize("bad_call", [1, 2])
def test_one_ranks_bad_gradient_skips_the_step_on_all(run: Run, bad_call: int) -> None:
    run(2, _bad_gradient_on_one_rank, bad_call)


def test_weights_that_stay_gathered_are_refused(run: Run) -> None:
    run(2, _refuse_weights_that_stay_gathered)


def test_an_optimizer_from_before_the_sharding_is_refused(run: Run) -> None:
    run(2, _refuse_parameters_from_before_the_sharding)


def test_a_state_dict_of_a_fresh_optimizer_changes_no_shard(run: Run) -> None:
    run(2, _fresh_state_dict)


@pytest.mark.parametrize(("world_size", "hsdp"), [(2, False), (3, False), (4, True)])
def test_the_norm_over_shards_is_that_of_the_whole(run: Run, world_size: int, hsdp: bool) -> None:
    model = make_model(seed=2)
    model(*make_batch(model, seed=4, rank=0)).backward()
    expected = global_grad_norm(model.parameters())
    results = run(world_size, _norms, hsdp)
    assert all(result[:2] == results[0][:2] for result in results)
    norm, clipped, _ = results[0]
    assert norm == pytest.approx(expected, rel=1e-6)
    assert clipped == pytest.approx(0.1, rel=1e-4)
    reached = results[world_size // 2 :] if hsdp else results
    assert not any(math.isfinite(poisoned) for _, _, poisoned in reached)
