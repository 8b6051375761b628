"""An optimizer made of a model goes by the parameters that the model has at each step: those that
were replaced since it was made are followed into `param_groups`, or refused by name."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from qsdp.optim import ACDC, GMP, SAM, CrAM
from qsdp.optim.masked import MaskedOptimizer
from qsdp.sparsity.schedule import ACDCSchedule, GMPSchedule
from tests_distributed.support.helpers import Toy, make_batch, make_model

NUM_STEPS = 4
PHASES = ACDCSchedule(steps=NUM_STEPS, warmup=1, phase=1, last_dense=1, last_sparse=1)
GROWTH = GMPSchedule(steps=NUM_STEPS, start=1, end=3, every=1, initial=0.2, sparsity=0.6)
METHODS: dict[str, Any] = {
    "CrAM+": lambda m, base: CrAM(m, base, sparsity=(0.3, 0.6)),
    "CrAM": lambda m, base: CrAM(m, base, sparsity=(0.3, 0.6), plus=False),
    "SAM": SAM,
    "ACDC": lambda m, base: ACDC(m, base, schedule=PHASES, target=0.5),
    "GMP": lambda m, base: GMP(m, base, schedule=GROWTH),
}
TWO_PASSES = ("CrAM+", "CrAM", "SAM")
MASKED = ("ACDC", "GMP")
of_every_method = pytest.mark.parametrize("method", list(METHODS))

# Masks are renewed after steps 1 and 5; AC/DC lifts them after step 3.
WEIGHT = "blocks.0.out.weight"
RARELY_RENEWED: dict[str, Any] = {
    "ACDC": lambda m, base: ACDC(
        m,
        base,
        schedule=ACDCSchedule(steps=9, warmup=1, phase=2, last_dense=0, last_sparse=2),
        target=0.5,
    ),
    "GMP": lambda m, base: GMP(
        m,
        base,
        schedule=GMPSchedule(steps=9, start=1, every=4, end=5, initial=0.3, sparsity=0.6),
    ),
}


def said(work: Callable[[], object]) -> str:
    """What refuses ``work``."""
    try:
        work()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def bits(tensor: Tensor | None) -> Any:
    """What two tensors have in common that are the same bit for bit."""
    if tensor is None:
        return None
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def all_bits(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def weights(model: nn.Module) -> dict[str, Any]:
    return all_bits(dict(model.named_parameters()))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)


def closure_of(
    called: Callable[..., Tensor], toy: Toy, step: int, rank: int | None = 0
) -> Callable[[], float]:
    """One forward and backward pass of ``toy``, or of what holds it."""

    def closure() -> float:
        loss = called(*make_batch(toy, step, rank))
        loss.backward()
        return loss.item()

    return closure


def train(
    optimizer: Any,
    called: Callable[..., Tensor],
    toy: Toy,
    steps: range = range(NUM_STEPS),
    rank: int | None = 0,
) -> list[Any]:
    """Losses, and what is pruned after each step."""
    found = []
    for step in steps:
        optimizer.zero_grad()
        found.append((optimizer.step(closure_of(called, toy, step, rank)), optimizer.pruned))
    optimizer.zero_grad()
    return found


def hand_over(optimizer: Any, model: nn.Module, *, in_place: bool = True) -> None:
    """Put the model's parameters where the optimizer, made of all of them, has its own."""
    (group,) = optimizer.param_groups
    if in_place:
        for i, parameter in enumerate(model.parameters()):
            group["params"][i] = parameter
    else:
        group["params"] = list(model.parameters())


def _assign(model: Toy) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _leave_meta(model: Toy) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(make_model(1).state_dict())


def _exchange_a_module(model: Toy) -> None:
    mlp = model.blocks[1].get_submodule("mlp")
    mlp.up = copy.deepcopy(mlp.get_submodule("up"))


WAYS: dict[str, tuple[Callable[[], Toy], Callable[[Toy], None], str]] = {
    "load_state_dict(assign=True)": (lambda: make_model(1), _assign, r"embed\.weight|blocks\."),
    "to_empty": (lambda: make_model(1).to("meta"), _leave_meta, r"embed\.weight|blocks\."),
    "another module": (lambda: make_model(1), _exchange_a_module, r"blocks\.1\.mlp\.up\."),
}


@of_every_method
@pytest.mark.parametrize("way", list(WAYS))
def test_replaced_parameters_are_refused_until_the_optimizer_has_them(
    method: str, way: str
) -> None:
    make, replace, name = WAYS[way]
    model, twin = make(), make()
    optimizer = METHODS[method](model, adamw(model))
    for each in (model, twin):
        replace(each)
    before = weights(model)
    with pytest.raises(RuntimeError, match=name):
        optimizer.step(closure_of(model, model, 0))
    assert weights(model) == before
    hand_over(optimizer, model, in_place=way == "to_empty")
    expected = train(METHODS[method](twin, adamw(twin)), twin, twin)
    assert train(optimizer, model, model) == expected
    assert weights(model) == weights(twin) != before


@of_every_method
@pytest.mark.parametrize("way", ["load_state_dict(assign=True)", "another module"])
def test_parameters_replaced_amid_training_are_refused(method: str, way: str) -> None:
    make, replace, name = WAYS[way]
    model = make()
    optimizer = METHODS[method](model, adamw(model))
    train(optimizer, model, model, range(2))
    replace(model)
    before, num_steps = weights(model), optimizer.num_steps
    with pytest.raises(RuntimeError, match=name):
        optimizer.step(closure_of(model, model, 2))
    assert weights(model) == before
    assert optimizer.num_steps == num_steps


@pytest.mark.parametrize("method", ["CrAM+", "CrAM", *MASKED])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_prunable_parameter_that_is_no_longer_there_is_named(method: str, steps: int) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, adamw(model))
    train(optimizer, model, model, range(steps))
    block: Any = model.blocks[1]
    block.projection = block.out
    del block.out
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.out\.weight"):
        optimizer.step(closure_of(model, model, steps))
    assert weights(model) == before


@of_every_method
@pytest.mark.parametrize("with_closure", [True, False])
def test_a_flat_partition_in_their_place_is_refused(method: str, with_closure: bool) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, adamw(model))
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    if not with_closure:
        flat.grad = torch.ones_like(flat)
    before, flat_before = weights(model), bits(flat)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step(closure_of(model, model, 0) if with_closure else None)
    assert "\n" not in str(caught.value)
    assert (weights(model), bits(flat)) == (before, flat_before)


class Holder(nn.Module):
    """Holds a model, as a library's wrapper does."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, *batch: Tensor) -> Any:
        return self.held(*batch)


def with_blocks(model: Any, wrap: Callable[[Any], Any]) -> Any:
    """``model``, whose blocks are wrapped in place."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrap(block)
    return model


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


WRAPS: dict[str, Callable[[Any], Any]] = {
    "held": Holder,
    "whole checkpointed": checkpoint_wrapper,
    "blocks checkpointed": lambda model: with_blocks(model, checkpoint_wrapper),
    "compiled": compiled,
    "blocks compiled": lambda model: with_blocks(model, compiled),
}


@pytest.mark.parametrize(
    ("method", "wrap"),
    [
        *((method, wrap) for method in METHODS for wrap in WRAPS if "compiled" not in wrap),
        ("CrAM+", "compiled"),
        ("ACDC", "blocks compiled"),
    ],
)
def test_a_wrapper_put_around_the_model_later_changes_nothing(method: str, wrap: str) -> None:
    model, twin = make_model(1, num_layers=1), make_model(1, num_layers=1)
    optimizer = METHODS[method](model, adamw(model))
    called = WRAPS[wrap](model)
    expected = train(METHODS[method](twin, adamw(twin)), twin, twin)
    found = train(optimizer, called, model)
    if "compiled" in wrap:  # it adds up in another order
        torch.testing.assert_close(found, expected)
    else:
        assert found == expected
        assert list(weights(called).values()) == list(weights(twin).values())


def test_sam_over_none_of_the_models_parameters_is_refused() -> None:
    other = make_model(2)
    with pytest.raises(ValueError) as caught:
        SAM(make_model(1), torch.optim.SGD(other.parameters(), lr=0.1))
    assert "\n" not in str(caught.value)
    model = make_model(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SAM(model, torch.optim.SGD([model.head.weight], lr=0.1))


BASES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "plain sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
}


@pytest.mark.parametrize("method", MASKED)
@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("steps", [1, 2])
def test_masks_of_parameters_that_were_swapped_are_not_lost_silently(
    method: str, base: str, steps: int
) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, BASES[base](model))
    train(optimizer, model, model, range(steps))
    _assign(model)
    hand_over(optimizer, model)
    before = weights(model)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step(closure_of(model, model, steps))
    assert "\n" not in str(caught.value)
    assert weights(model) == before


# --- parameters that are frozen or unfrozen ------------------------------------------------------


def share_due(optimizer: Any) -> float:
    """What the masks of one of `RARELY_RENEWED` are to prune now."""
    if isinstance(optimizer, GMP):
        return optimizer.schedule.sparsity_at(optimizer.num_steps)
    return 0.5 if optimizer.schedule.is_compressed(optimizer.num_steps) else 0.0


def assert_masked(share: float, masks: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """``share`` of all of ``trained`` together is zero, and the masks say so (whole tensors)."""
    assert set(masks) == set(trained)
    num_zeros = 0
    for name, weight in trained.items():
        assert torch.equal(weight == 0, ~masks[name])
        num_zeros += int((weight == 0).sum())
    assert share > 0
    assert num_zeros == round(share * sum(w.numel() for w in trained.values()))


def _assert_masked(optimizer: MaskedOptimizer, trained: Mapping[str, Tensor]) -> None:
    assert_masked(share_due(optimizer), optimizer.masks(), trained)


def _prunable(model: Toy) -> dict[str, nn.Parameter]:
    suffixes = ("qkv.weight", "out.weight", "up.weight", "down.weight")
    return {n: p for n, p in model.named_parameters() if n.endswith(suffixes)}


@pytest.mark.parametrize("method", MASKED)
def test_an_unfrozen_weight_is_masked_from_the_next_renewal_on(method: str) -> None:
    model = make_model(1)
    weight = model.get_parameter(WEIGHT).requires_grad_(False)
    optimizer = RARELY_RENEWED[method](model, adamw(model))
    train(optimizer, model, model, range(2))
    others = {name: p for name, p in _prunable(model).items() if name != WEIGHT}
    _assert_masked(optimizer, others)
    before = weight.clone()
    weight.requires_grad_(True)
    train(optimizer, model, model, range(2, 4))
    assert not (weight == 0).any()
    assert not torch.equal(weight, before)
    for step in (4, 5):
        train(optimizer, model, model, range(step, step + 1))
        _assert_masked(optimizer, _prunable(model))
    assert (weight == 0).any()


@pytest.mark.parametrize("method", MASKED)
def test_a_frozen_weight_is_counted_no_longer_and_stays_as_it_is(method: str) -> None:
    model = make_model(1)
    weight = model.get_parameter(WEIGHT)
    optimizer = RARELY_RENEWED[method](model, adamw(model))
    train(optimizer, model, model, range(2))
    _assert_masked(optimizer, _prunable(model))
    weight.requires_grad_(False)
    before = bits(weight)
    others = {name: p for name, p in _prunable(model).items() if name != WEIGHT}
    train(optimizer, model, model, range(2, 5))
    _assert_masked(optimizer, others)
    train(optimizer, model, model, range(5, 9))
    assert bits(weight) == before
    assert (weight == 0).any()


@pytest.mark.parametrize("method", MASKED)
def test_a_weight_that_is_frozen_for_a_while_is_masked_again(method: str) -> None:
    model = make_model(1)
    weight = model.get_parameter(WEIGHT)
    optimizer = RARELY_RENEWED[method](model, adamw(model))
    train(optimizer, model, model, range(2))
    weight.requires_grad_(False)
    train(optimizer, model, model, range(2, 4))
    weight.requires_grad_(True)
    train(optimizer, model, model, range(4, 6))
    _assert_masked(optimizer, _prunable(model))


# --- what a step is given -----------------------------------------------------------------------


@pytest.mark.parametrize("method", TWO_PASSES)
@pytest.mark.parametrize(
    ("lr", "has_grads", "steps"), [(0.1, True, 0), (0.1, False, 0), (0.0, True, 0), (0.1, True, 1)]
)
def test_two_passes_need_a_closure(method: str, lr: float, has_grads: bool, steps: int) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))
    train(optimizer, model, model, range(steps))
    if has_grads:
        closure_of(model, model, steps)()

    def found() -> Any:
        return (
            weights(model),
            [bits(p.grad) for p in model.parameters()],
            [bits(state["momentum_buffer"]) for state in optimizer.state.values()],
            optimizer.num_steps,
        )

    before = found()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    assert found() == before


@pytest.mark.parametrize("method", TWO_PASSES)
def test_a_trainers_own_step_after_that_with_a_closure_does_nothing(method: str) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, adamw(model))
    train(optimizer, model, model, range(1))
    before = weights(model)
    assert optimizer.step() is None
    assert weights(model) == before
    assert optimizer.num_steps == 1


@pytest.mark.parametrize("method", TWO_PASSES)
def test_the_bases_step_is_the_plain_one(method: str) -> None:
    model, plain = make_model(1), make_model(1)
    optimizer, alone = METHODS[method](model, adamw(model)), adamw(plain)
    closure_of(model, model, 0)()
    closure_of(plain, plain, 0)()
    optimizer.base.step()
    alone.step()
    assert weights(model) == weights(plain)
    assert optimizer.num_steps == 0


@pytest.mark.parametrize("method", MASKED)
def test_a_closure_is_one_way_of_two_to_take_a_masked_step(method: str) -> None:
    models = [make_model(1), make_model(1)]
    first, second = (METHODS[method](model, adamw(model)) for model in models)
    train(first, models[0], models[0])
    for step in range(NUM_STEPS):
        second.zero_grad()
        closure_of(models[1], models[1], step)()
        assert second.step() is None
    assert weights(models[0]) == weights(models[1])


@pytest.mark.parametrize("method", TWO_PASSES)
@pytest.mark.parametrize("where", ["all", "head.weight"])
def test_gradients_of_earlier_micro_batches_are_refused(method: str, where: str) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, adamw(model))
    closure_of(model, model, 0)()
    if where != "all":
        for name, parameter in model.named_parameters():
            parameter.grad = parameter.grad if name == where else None
    before = weights(model), [bits(p.grad) for p in model.parameters()]
    num_calls = 0

    def closure() -> None:
        nonlocal num_calls
        num_calls += 1

    with pytest.raises(RuntimeError, match="micro-batch"):
        optimizer.step(closure)
    assert (weights(model), [bits(p.grad) for p in model.parameters()]) == before
    assert num_calls == optimizer.num_steps == 0
    optimizer.zero_grad()
    twin = make_model(1)
    expected = train(METHODS[method](twin, adamw(twin)), twin, twin)
    assert train(optimizer, model, model) == expected
    assert weights(model) == weights(twin)


@pytest.mark.parametrize("method", TWO_PASSES)
def test_gradients_of_a_step_that_is_tried_again_are_refused_too(method: str) -> None:
    model = make_model(1)
    optimizer = METHODS[method](model, adamw(model))
    train(optimizer, model, model, range(1))
    closure_of(model, model, 1)()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="micro-batch"):
            optimizer.step(closure_of(model, model, 1))


@pytest.mark.parametrize("method", TWO_PASSES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_gradients_that_were_filled_with_zeros_are_none(method: str, zero: float) -> None:
    model, twin = make_model(1), make_model(1)
    optimizer, other = METHODS[method](model, adamw(model)), METHODS[method](twin, adamw(twin))
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, zero)
        optimizer.zero_grad(set_to_none=math.copysign(1, zero) < 0 and step > 0)
        found = optimizer.step(closure_of(model, model, step))
        assert found == other.step(closure_of(twin, twin, step))
    assert weights(model) == weights(twin)


@pytest.mark.parametrize("method", MASKED)
def test_a_closures_gradient_is_added_to_those_that_are_there(method: str) -> None:
    models = [make_model(1), make_model(1)]
    for model, is_split in zip(models, (True, False), strict=True):
        optimizer = METHODS[method](model, adamw(model))
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            closure_of(model, model, 2 * step)()
            last = closure_of(model, model, 2 * step + 1)
            if is_split:
                optimizer.step(last)
            else:
                last()
                optimizer.step()
    assert weights(models[0]) == weights(models[1])


# --- what is read, replaced and added in between ------------------------------------------------


READS: dict[str, Callable[[Any], object]] = {
    "nothing": lambda optimizer: None,
    "masks": lambda optimizer: optimizer.masks(),
    "state": lambda optimizer: optimizer.state_dict(),
    "prunable": lambda optimizer: optimizer.prunable.names,
}


@pytest.mark.parametrize("method", MASKED)
@pytest.mark.parametrize("read", READS)
def test_what_is_frozen_for_a_moment_keeps_its_mask(method: str, read: str) -> None:
    model, plain = make_model(1), make_model(1)
    optimizer, twin = (RARELY_RENEWED[method](each, adamw(each)) for each in (model, plain))
    train(optimizer, model, model, range(2))
    train(twin, plain, plain, range(2))
    model.requires_grad_(False)
    READS[read](optimizer)
    model.requires_grad_(True)
    train(optimizer, model, model, range(2, 4))
    train(twin, plain, plain, range(2, 4))
    assert weights(model) == weights(plain)


def test_a_state_saved_while_a_part_is_frozen_has_all_masks() -> None:
    model, other = make_model(1), make_model(1)
    optimizer, resumed = (RARELY_RENEWED["GMP"](each, adamw(each)) for each in (model, other))
    train(optimizer, model, model, range(2))
    for each in (model, other):
        each.get_parameter(WEIGHT).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (model, other):
        each.get_parameter(WEIGHT).requires_grad_(True)
    train(optimizer, model, model, range(2, 4))
    train(resumed, other, other, range(2, 4))
    assert weights(model) == weights(other)
    assert (other.get_parameter(WEIGHT) == 0).any()


@pytest.mark.parametrize("method", MASKED)
def test_what_is_frozen_with_its_gradient_stays_pruned(method: str) -> None:
    """AdamW moves what has a gradient, though it be zero."""
    model = make_model(1)
    optimizer = RARELY_RENEWED[method](model, adamw(model))
    train(optimizer, model, model, range(2))
    zeros = model.get_parameter(WEIGHT) == 0
    assert zeros.any()
    model.get_parameter(WEIGHT).requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(model.get_parameter(WEIGHT) == 0, zeros)


def test_masks_are_lifted_from_what_is_frozen_too() -> None:
    model = make_model(1)
    optimizer = RARELY_RENEWED["ACDC"](model, adamw(model))
    train(optimizer, model, model, range(2))
    assert not optimizer.masks()[WEIGHT].all()
    model.get_parameter(WEIGHT).requires_grad_(False)
    train(optimizer, model, model, range(2, 4))
    model.get_parameter(WEIGHT).requires_grad_(True)
    assert optimizer.masks()[WEIGHT].all()


def test_what_is_trained_may_change_altogether() -> None:
    model = make_model(1)
    for parameter in model.blocks[1].parameters():
        parameter.requires_grad_(False)
    optimizer = RARELY_RENEWED["GMP"](model, adamw(model))
    train(optimizer, model, model, range(2))
    for block, is_trained in zip(model.blocks, (False, True), strict=True):
        block.requires_grad_(is_trained)
    with pytest.warns(UserWarning, match=r"GMP trains blocks\.1\.qkv\.weight, "):
        train(optimizer, model, model, range(2, 3))


def test_masks_that_are_gone_are_missed() -> None:
    model = make_model(1)
    optimizer = RARELY_RENEWED["GMP"](model, adamw(model))
    train(optimizer, model, model, range(2))
    optimizer.state.clear()
    assert "the masks of GMP are gone from the optimizer's state" in said(optimizer.step)


def test_what_is_trained_anew_under_masks_is_named() -> None:
    model = make_model(1)
    model.get_parameter(WEIGHT).requires_grad_(False)
    optimizer = RARELY_RENEWED["GMP"](model, adamw(model))
    train(optimizer, model, model, range(2))
    model.get_parameter(WEIGHT).requires_grad_(True)
    with pytest.warns(UserWarning, match=f"GMP trains {WEIGHT}, and prunes nothing of it"):
        train(optimizer, model, model, range(2, 3))


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
    assert "lacks 1 parameters of the model, 'embed.weight'" in said(optimizer.step)


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
    assert "lacks 1 parameters of the model, 'head.weight'" in said(optimizer.step)


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
    said = "has 1 parameters that the model does not have, and lacks 1 that it trains, 'embed"
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
    with pytest.raises(ValueError, match="a _Around that is none of its own; give the one"):
        METHODS["SAM"](model, _Around(adamw(model)))


@pytest.mark.parametrize("method", [CrAM, SAM, ACDC, GMP])
def test_an_argument_that_is_none_is_refused_with_those_that_are(method: Any) -> None:
    model = make_model(1)
    with pytest.raises(TypeError, match=r"has no argument 'sparse'; it takes model, base_optim"):
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
        monkeypatch.setattr("qsdp.optim.base.meet", differing)
    before = copy.deepcopy(marks())
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        REFUSALS[name](model, base)
    assert marks() == before, refusal  # while the exception holds what was refused
