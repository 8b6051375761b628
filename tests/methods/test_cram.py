"""CrAM in one process, against a reference on plain tensors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.func import functional_call

from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.clip_grad import clip_grad_norm_
from qsdp.methods.cram.optimizer import CrAM, cram_random_bits
from qsdp.methods.grad_norm import global_grad_norm
from qsdp.methods.sam.optimizer import SAM
from tests.support.cram_reference import ReferenceCrAM
from tests.support.masked_reference import sam_step
from tests_distributed.support.helpers import Toy, make_batch, make_model

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


class Recorder(torch.optim.SGD):
    """SGD that remembers the gradients of its last step."""

    grads: list[Tensor]

    def step(self, closure: Any = None) -> Any:
        self.grads = [p.grad.clone() for g in self.param_groups for p in g["params"]]
        return super().step(closure)


def _closure(model: nn.Module, batch: list[Tensor], num_micro: int = 1) -> Callable[[], Tensor]:
    """Backward over equal parts of the batch; returns the mean loss."""

    def closure() -> Tensor:
        total = torch.zeros(())
        for tokens, targets in zip(*(part.chunk(num_micro) for part in batch), strict=True):
            loss = model(tokens, targets) / num_micro
            loss.backward()
            total += loss.detach()
        return total

    return closure


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _steps(model: Toy, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    return [
        float(optimizer.step(_closure(model, make_batch(model, step, rank=0)))) for step in steps
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"plus": False},
        {"plus": False, "sparse_grad": False},
        {"normalize": True, "rho": 0.5},
        {"sparse_grad": False},
        {"max_norm": 0.1},
        {"max_norm": 0.1, "plus": False},
        {"rho": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_steps_are_those_of_the_paper(options: dict[str, Any], tied: bool) -> None:
    model = make_model(seed=1, tied=tied)
    optimizer = CrAM(model, Recorder(model.parameters(), **SGD), seed=3, **options)
    batch: list[Tensor] = []
    reference = ReferenceCrAM(
        weights=_weights(model),
        prunable=list(optimizer.prunable.names),
        loss=lambda weights: functional_call(model, weights, tuple(batch)),
        **options,
    )
    sparsities = set()
    for step in range(5):
        batch[:] = make_batch(model, seed=step, rank=0, batch_size=4)
        loss = optimizer.step(_closure(model, batch, num_micro=2))
        assert optimizer.last_target is not None
        sparsities.add(optimizer.last_target.sparsity)
        expected, _, grads = reference.step(optimizer.last_target.sparsity)
        torch.testing.assert_close(float(loss), expected, rtol=1e-5, atol=1e-5)
        if "max_norm" not in options:
            recorded = dict(zip(grads, optimizer.base.grads, strict=True))
            torch.testing.assert_close(recorded, grads, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(_weights(model), reference.weights, rtol=1e-5, atol=1e-6)
    assert len(sparsities) > 1
    assert optimizer.num_steps == 5
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_sam_is_the_papers(rho: float) -> None:
    model, plain = (make_model(seed=1, tied=True, frozen=True) for _ in range(2))
    made = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], **SGD)
        for m in (model, plain)
    ]
    optimizer = SAM(model, made[0], rho=rho)
    for step in range(5):
        batch = make_batch(model, seed=step, rank=0)
        optimizer.step(_closure(model, batch))
        sam_step(plain, lambda batch=batch: plain(*batch), made[1], rho)
        torch.testing.assert_close(_weights(model), _weights(plain), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="rho is -1"):
        SAM(model, made[0], rho=-1.0)


@pytest.mark.parametrize("trains_head_only", [False, True])
def test_sam_needs_no_prunable_set(trains_head_only: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    trained = model[2] if trains_head_only else model
    optimizer = SAM(model, torch.optim.SGD(trained.parameters(), lr=0.1))
    before = _weights(model)

    def closure() -> Tensor:
        loss = model(torch.ones(1, 1, 4, 4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    for name, weight in _weights(model).items():
        is_trained = name.startswith("2.") or not trains_head_only
        assert torch.equal(weight, before[name]) != is_trained


def _with_embedding(*, sparse: bool) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(4, 8, sparse=sparse), nn.Linear(8, 2))


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_a_base_that_takes_closures_or_sparse_gradients_is_refused(make: Any) -> None:
    model = _with_embedding(sparse=False)
    base = make(list(model.parameters()))
    for wrapper, options in (
        (CrAM, {"prunable": ["1.weight"]}),
        (SAM, {}),
        (ACDC, {"schedule": 20, "prunable": ["1.weight"]}),
    ):
        with pytest.raises(ValueError, match=f"is {make.__name__}: give one whose") as caught:
            wrapper(model, base, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prunable", ["1.weight", "0.weight"])
@pytest.mark.parametrize("method", ["cram", "acdc", "clip"])
def test_sparse_gradients_are_refused(method: str, prunable: str) -> None:
    model = _with_embedding(sparse=True)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = ACDCSchedule(steps=9, warmup=1, phase=4, last_dense=0, last_sparse=1)
    before = _weights(model)

    def closure() -> Tensor:
        loss = model(torch.arange(4)).square().sum()
        loss.backward()
        return loss

    def step() -> None:
        if method == "cram":
            CrAM(model, base, prunable=[prunable]).step(closure)
        elif method == "acdc":
            ACDC(model, base, schedule=schedule, prunable=[prunable]).step(closure)
        else:
            closure()
            clip_grad_norm_(model.parameters(), 1.0)

    with pytest.raises(ValueError, match=r"is torch\.sparse_coo, but only dense ones"):
        step()
    assert all(torch.equal(w, before[name]) for name, w in _weights(model).items())


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("method", ["cram", "acdc"])
def test_copies_are_refused_and_a_state_is_not(method: str, make_copy: Any) -> None:
    def make() -> tuple[Toy, CrAM | ACDC]:
        model = make_model(seed=1)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        made = CrAM(model, base) if method == "cram" else ACDC(model, base, schedule=20)
        return model, made

    model, optimizer = make()
    _steps(model, optimizer, range(3))
    with pytest.raises(TypeError, match="cannot be copied or pickled: copy the model"):
        make_copy(optimizer)
    twin, other = make()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.zero_grad()  # AC/DC leaves them to its caller
    assert _steps(twin, other, range(3, 6)) == _steps(model, optimizer, range(3, 6))


def test_the_second_pass_sees_exact_zeros_and_an_exact_count() -> None:
    model = make_model()
    optimizer = CrAM(model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.9)
    zeros = []
    inner = _closure(model, make_batch(model, seed=0, rank=0))

    def closure() -> Tensor:
        weights = torch.cat([p.detach().flatten() for p in optimizer.prunable.parameters])
        zeros.append(int((weights.view(torch.int32) == 0).sum()))
        return inner()

    optimizer.step(closure)
    total = sum(p.numel() for p in optimizer.prunable.parameters)
    assert zeros == [0, round(0.9 * total)]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_an_exception_in_either_pass_restores_every_bit(failing_call: int) -> None:
    model = make_model(seed=2)
    optimizer = CrAM(model, torch.optim.AdamW(model.parameters()))
    with torch.no_grad():
        model.get_parameter("blocks.0.out.weight")[0, 0] = -0.0
    before = _weights(model)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = model(*make_batch(model, seed=0, rank=0))
        loss.backward()
        if calls == failing_call:
            raise LookupError
        return loss

    with pytest.raises(LookupError):
        optimizer.step(closure)
    for name, value in _weights(model).items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32))
    assert not optimizer.state
    assert optimizer.num_steps == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad_call", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(bad_call: int, bad: float) -> None:
    model = make_model(seed=2)
    optimizer = CrAM(model, torch.optim.AdamW(model.parameters()))
    before = _weights(model)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = model(*make_batch(model, seed=0, rank=0))
        loss.backward()
        if calls == bad_call:
            model.norm.bias.grad[3] = bad
        return loss.detach()

    assert math.isfinite(float(optimizer.step(closure)))
    assert calls == bad_call
    assert optimizer.skipped_steps == 1
    assert optimizer.num_steps == 1
    assert not math.isfinite(optimizer.last_grad_norm or 0)
    assert not optimizer.state
    torch.testing.assert_close(_weights(model), before, rtol=0, atol=0)
    _steps(model, optimizer, range(1))
    assert optimizer.skipped_steps == 1
    assert not torch.equal(_weights(model)["norm.bias"], before["norm.bias"])


@pytest.mark.parametrize("through_dcp", [False, True])
def test_a_resumed_run_repeats_the_uninterrupted_one(through_dcp: bool) -> None:
    model = make_model(seed=4)
    optimizer = CrAM(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    _steps(model, optimizer, range(3))
    schedule.step()
    weights = copy.deepcopy(model.state_dict())
    if through_dcp:
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    else:
        state = copy.deepcopy(optimizer.state_dict())
    losses = _steps(model, optimizer, range(3, 6))

    again = make_model(seed=5)
    again.load_state_dict(weights)
    resumed = CrAM(again, torch.optim.AdamW(again.parameters(), lr=1.0))
    if through_dcp:
        set_optimizer_state_dict(again, resumed, state)
    else:
        resumed.load_state_dict(state)
    assert resumed.num_steps == 3
    assert resumed.base.param_groups is resumed.param_groups
    assert resumed.base.state is resumed.state
    assert _steps(again, resumed, range(3, 6)) == losses
    torch.testing.assert_close(_weights(again), _weights(model), rtol=0, atol=0)


def test_a_bare_base_optimizers_state_can_be_loaded() -> None:
    model = make_model()
    base = torch.optim.AdamW(model.parameters())
    loss = model(*make_batch(model, seed=0, rank=0))
    loss.backward()
    base.step()
    optimizer = CrAM(model, torch.optim.AdamW(model.parameters()))
    optimizer.load_state_dict(base.state_dict())
    assert optimizer.num_steps == 0
    assert optimizer.state[model.norm.bias]["step"] == 1


def test_a_schedule_on_either_reaches_both() -> None:
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = CrAM(model, base)
    for scheduled in (optimizer, base):
        base.param_groups[0]["lr"] = 1.0
        schedule = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 0.5**step)
        _steps(model, optimizer, range(1))
        schedule.step()
        assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.5


def test_a_state_dict_of_a_fresh_optimizer_changes_nothing() -> None:
    model = make_model()
    optimizer = CrAM(model, torch.optim.AdamW(model.parameters()))
    before = _weights(model)
    get_optimizer_state_dict(model, optimizer)
    torch.testing.assert_close(_weights(model), before, rtol=0, atol=0)
    assert optimizer.num_steps == optimizer.skipped_steps == 0


def test_frozen_and_unused_parameters_stay_as_they_are() -> None:
    model = make_model(frozen=True, unused=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = CrAM(model, torch.optim.SGD(trained, lr=0.1))
    before = _weights(model)
    _steps(model, optimizer, range(2))
    after = _weights(model)
    same = {name for name in before if torch.equal(before[name], after[name])}
    unused = {f"blocks.{i}.unused.{kind}" for i in range(2) for kind in ("weight", "bias")}
    assert same == {"blocks.0.out.weight", "blocks.0.out.bias", "blocks.0.norm1.weight"} | unused


def test_the_sparsity_is_a_function_of_seed_and_step() -> None:
    draws = [cram_random_bits(seed, step) for seed in range(40) for step in range(100)]
    assert len(set(draws)) == len(draws)
    # 4000 draws of thirds: 6 standard deviations are 179.
    for choice in range(3):
        assert abs(sum(value % 3 == choice for value in draws) - len(draws) / 3) < 179


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": (0.5, 1.2)}, "sparsity is 1.2"),
        ({"sparsity": ()}, "sparsity is empty"),
        ({"rho": -1.0}, "rho is -1.0"),
        ({"rho": math.nan}, "rho is nan"),
        ({"max_norm": 0.0}, "max_norm is 0.0"),
        ({"prunable": ["nothing"]}, "matches no parameter"),
        ({"normalize": True, "rho": 0.0}, "normalize is given where"),
        ({"sparse_grad": False, "sparsity": ("4bit", 0.0)}, "sparse_grad is given where"),
        ({"prunable": ["*.weight"], "sparsity": 0.0}, "prunable is given where"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=message):
        CrAM(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    other = make_model()
    with pytest.raises(ValueError, match=r"lacks 8 prunable parameters of the model, 'blocks\.0\."):
        CrAM(make_model(), torch.optim.SGD(other.parameters(), lr=0.1))


def test_clipping_is_that_of_torch() -> None:
    model = make_model()
    model(*make_batch(model, seed=0, rank=0)).backward()
    parameters = list(model.parameters())
    grads = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = clip_grad_norm_([*parameters, parameters[0]], 0.05)
    clipped = [p.grad.clone() for p in parameters if p.grad is not None]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    torch.testing.assert_close(float(torch.nn.utils.clip_grad_norm_(parameters, 0.05)), norm)
    torch.testing.assert_close([p.grad for p in parameters], clipped)
    assert global_grad_norm([]) == 0.0
    norm = global_grad_norm(parameters)
    assert clip_grad_norm_(parameters, 2 * norm) == global_grad_norm(parameters) == norm
