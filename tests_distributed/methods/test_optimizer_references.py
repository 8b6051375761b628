"""An optimizer made before its model is sharded, wrapped or loaded anew trains as one made after.

It does once it was given the model's parameters; until then every rank refuses to step.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qsdp
from tests.support.optimizers import (
    MASKED,
    METHODS,
    NUM_STEPS,
    TWO_PASSES,
    Holder,
    adamw,
    bits,
    closure_of,
    compiled,
    hand_over,
    said,
    train,
    with_blocks,
)
from tests_distributed.support.helpers import (
    Toy,
    all_ranks,
    collected,
    full_state,
    make_batch,
    shard,
)
from tests_distributed.support.running import Run, selection
from tests_distributed.support.small_toy import prepare, small_toy, tell, whole_bits

PRELOADED = ["torch._dynamo.backends.common"]


# --- made before the sharding -------------------------------------------------------------------


def _trained(method: str, wire_bits: int | None, order: str) -> tuple[Any, Any, int]:
    """Losses and ``pruned``; the weights; how many of the whole parameters outlived the swap."""
    model = small_toy()
    whole = [weakref.ref(parameter) for parameter in model.parameters()]
    if order == "made afterwards":
        shard(model)
        optimizer = METHODS[method](model, adamw(model))
    else:
        optimizer = METHODS[method](model, adamw(model))
        prepare(model, optimizer, in_place=order == "swapped in place")
    gc.collect()
    num_alive = sum(parameter() is not None for parameter in whole)
    tell(optimizer, model, wire_bits)
    found = train(optimizer, model, model, range(1), rank=None)
    found += train(optimizer, model, model, range(1, NUM_STEPS), rank=None)
    return found, whole_bits(model), num_alive


def _compare_orders(method: str, wire_bits: int | None) -> None:
    expected, weights, _ = _trained(method, wire_bits, "made afterwards")
    for order in ("swapped in place", "swapped as a list"):
        found, found_weights, num_alive = _trained(method, wire_bits, order)
        assert found == expected, order
        assert found_weights == weights, order
        assert num_alive == 0, order


@selection(
    "method, wire_bits",
    [
        *(("CrAM", 8), ("SAM", None), ("ACDC", 8), ("GMP", None)),
    ],
    tuple(METHODS),
    [None, 8],
)
def test_an_optimizer_from_before_the_sharding_trains_as_one_from_after_it(
    run: Run, method: str, wire_bits: int | None
) -> None:
    run(3 if method == "SAM" else 2, _compare_orders, method, wire_bits)


def _zeros_when_made_before() -> float:
    model = small_toy()
    optimizer = METHODS["ACDC"](model, adamw(model))
    prepare(model, optimizer, in_place=True)
    train(optimizer, model, model, rank=None)
    weights = [full_state(model)[f"blocks.0.{n}.weight"] for n in ("qkv", "out", "mlp.up")]
    weights.append(full_state(model)["blocks.0.mlp.down.weight"])
    assert optimizer.pruned == 0.5
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_what_is_said_to_be_pruned_is_zero_in_the_sharded_model(run: Run) -> None:
    assert run(2, _zeros_when_made_before) == [0.5, 0.5]


def _refuse_unswapped(with_closure: bool) -> dict[str, str]:
    """What each method says, of which nothing is changed."""
    found = {}
    for method in METHODS:
        if not with_closure and method in TWO_PASSES:
            continue
        model = small_toy()
        optimizer = METHODS[method](model, adamw(model))
        shard(model)
        before = whole_bits(model)
        closure = closure_of(model, model, 0, None)
        if not with_closure:
            closure()
        found[method] = said(lambda: optimizer.step(closure if with_closure else None))  # noqa: B023
        assert whole_bits(model) == before, method
        assert optimizer.num_steps == 0
    return found


@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_from_before_the_sharding_are_refused_by_every_rank(
    run: Run, world_size: int, with_closure: bool
) -> None:
    for found in run(world_size, _refuse_unswapped, with_closure):
        for method, text in found.items():
            assert "shard" in text, (method, text)
            assert "\n" not in text


OTHERS: dict[str, tuple[Any, str]] = {
    "sparsity": (lambda m, b, odd: qsdp.CrAM(m, b, sparsity=0.6 if odd else 0.5), "sparsity"),
    "plus": (lambda m, b, odd: qsdp.CrAM(m, b, plus=not odd), "plus"),
    "rho": (lambda m, b, odd: qsdp.SAM(m, b, rho=0.1 if odd else 0.05), "rho"),
    "target": (
        lambda m, b, odd: qsdp.ACDC(m, b, schedule=20, target=0.6 if odd else 0.5),
        "target",
    ),
    "schedule": (
        lambda m, b, odd: qsdp.GMP(m, b, schedule=qsdp.GMPSchedule.of(20, 0.6 if odd else 0.5)),
        "schedule",
    ),
    "prunable": (
        lambda m, b, odd: qsdp.CrAM(m, b, prunable=["blocks.*.qkv.weight" if odd else "blocks.*t"]),
        "prunable",
    ),
}


def _refuse_other_arguments() -> dict[str, tuple[str, str]]:
    """What is said at the step after the first, which all were to refuse, too."""
    found = {}
    for name, (make, _) in OTHERS.items():
        model = small_toy()
        optimizer = make(model, adamw(model), dist.get_rank() == 1)
        prepare(model, optimizer, in_place=True)
        before = whole_bits(model)
        texts = [said(lambda: optimizer.step(closure_of(model, model, 0, None))) for _ in "12"]  # noqa: B023
        found[name] = texts[0], texts[1]
        assert whole_bits(model) == before, name
    return found


def test_other_arguments_from_before_the_sharding_are_refused_at_the_first_step(run: Run) -> None:
    for found in run(2, _refuse_other_arguments):
        for name, (_, word) in OTHERS.items():
            for text in found[name]:
                assert word in text, (name, text)
                assert "rank 1" in text, (name, text)


# --- replaced -----------------------------------------------------------------------------------


def _assign(model: Toy) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _leave_meta(model: Toy) -> None:
    model.to_empty(device="cpu")
    # A function of the place alone, the same with any sharding.
    with torch.no_grad():
        for i, (name, value) in enumerate(model.named_parameters()):
            value.to_local().fill_(1.0 if "norm" in name else 0.03 * (i + 1) * (-1) ** i)  # type: ignore[attr-defined]


def _meta() -> Toy:
    return shard(small_toy().to("meta"))


WAYS: dict[str, tuple[Callable[[], Toy], Callable[[Toy], None]]] = {
    "assign": (lambda: shard(small_toy()), _assign),
    "to_empty": (_meta, _leave_meta),
}


def _follow_replaced(way: str, method: str) -> str | None:
    """What is said of replaced parameters; None where the old ones were filled."""
    make, replace = WAYS[way]
    model, twin = make(), make()
    optimizer = METHODS[method](model, adamw(model))
    old = list(model.parameters())
    for each in (model, twin):
        replace(each)
    text = None
    if any(a is not b for a, b in zip(old, model.parameters(), strict=True)):
        before = whole_bits(model)
        text = said(lambda: optimizer.step(closure_of(model, model, 0, None)))
        assert whole_bits(model) == before
        hand_over(optimizer, model)
    expected = train(METHODS[method](twin, adamw(twin)), twin, twin, rank=None)
    assert train(optimizer, model, model, rank=None) == expected
    assert whole_bits(model) == whole_bits(twin)
    return text


@selection(
    "way, method",
    [*(("assign", method) for method in ("CrAM", "SAM", "ACDC", "GMP")), ("to_empty", "ACDC")],
    tuple(WAYS),
    tuple(METHODS),
)
def test_replaced_shards_are_refused_until_the_optimizer_has_them(
    run: Run, way: str, method: str
) -> None:
    for text in run(2, _follow_replaced, way, method):
        assert text is not None or way == "to_empty"  # which swaps the insides of DTensors
        if text is not None:
            assert "embed.weight" in text or "blocks.0." in text
            assert "\n" not in text


def _replace_on_one_rank(odd: int, steps: int) -> dict[str, str]:
    found = {}
    for method in METHODS:
        model = shard(small_toy())
        optimizer = METHODS[method](model, adamw(model))
        train(optimizer, model, model, range(steps), rank=None)
        if dist.get_rank() == odd:
            _assign(model)
        before = whole_bits(model)
        found[method] = said(lambda: optimizer.step(closure_of(model, model, 0, None)))  # noqa: B023
        assert whole_bits(model) == before, method
        assert optimizer.num_steps == steps
    return found


@pytest.mark.parametrize(("world_size", "odd", "steps"), [(2, 0, 0), (2, 1, 2), (3, 1, 0)])
def test_parameters_replaced_on_one_rank_are_refused_by_all(
    run: Run, world_size: int, odd: int, steps: int
) -> None:
    for rank, found in enumerate(run(world_size, _replace_on_one_rank, odd, steps)):
        for method, text in found.items():
            # The odd rank may name the parameter alone.
            is_named = f"rank {odd}" in text or (rank == odd and "weight" in text)
            assert is_named, (method, rank, text)
            assert "\n" not in text


def _refuse_flat(with_closure: bool) -> dict[str, str]:
    found = {}
    for method in METHODS:
        model = shard(small_toy())
        optimizer = METHODS[method](model, adamw(model))
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in small_toy().parameters()]))
        optimizer.param_groups[0]["params"] = [flat]
        closure = closure_of(model, model, 0, None)
        if not with_closure:
            closure()
            flat.grad = torch.ones_like(flat)
        before, flat_before = whole_bits(model), bits(flat)
        found[method] = said(lambda: optimizer.step(closure if with_closure else None))  # noqa: B023
        assert (whole_bits(model), bits(flat)) == (before, flat_before), method
    return found


@pytest.mark.parametrize("with_closure", [True, False])
def test_a_flat_partition_in_their_place_is_refused(run: Run, with_closure: bool) -> None:
    for found in run(2, _refuse_flat, with_closure):
        for method, text in found.items():
            assert text != "nothing", method
            assert "\n" not in text


def _swap_amid_training(method: str, steps: int) -> str:
    model = shard(small_toy())
    optimizer = METHODS[method](model, adamw(model))
    train(optimizer, model, model, range(steps), rank=None)
    _assign(model)
    hand_over(optimizer, model)
    before = whole_bits(model)
    text = said(lambda: optimizer.step(closure_of(model, model, steps, None)))
    assert whole_bits(model) == before
    return text


@pytest.mark.parametrize("method", MASKED)
@pytest.mark.parametrize("steps", [1, 2])
def test_masks_of_shards_that_were_swapped_are_not_lost_silently(
    run: Run, method: str, steps: int
) -> None:
    for text in run(2, _swap_amid_training, method, steps):
        assert text != "nothing"
        assert "\n" not in text


# --- wrapped ------------------------------------------------------------------------------------


def _shard_outer(model: Toy) -> Any:
    outer = Holder(model)
    mesh = all_ranks()
    fully_shard(model.blocks[0], mesh=mesh)
    return fully_shard(outer, mesh=mesh)


def _blocks_checkpointed(model: Toy) -> Any:
    return with_blocks(model, checkpoint_wrapper)


LAYOUTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    # Before the optimizer is made, after that, and both for the one that it is compared with.
    "ddp": (lambda m: m, DistributedDataParallel, DistributedDataParallel),
    "ddp, blocks checkpointed": (
        lambda m: m,
        lambda m: DistributedDataParallel(_blocks_checkpointed(m)),
        DistributedDataParallel,
    ),
    "held": (shard, Holder, shard),
    "blocks checkpointed": (shard, _blocks_checkpointed, shard),
    "compiled": (shard, compiled, shard),
    "sharded from outside": (lambda m: m, _shard_outer, _shard_outer),
}


def _wrap(layout: str, method: str) -> None:
    first, second, together = LAYOUTS[layout]
    toy, twin = small_toy(), small_toy()
    made_of = first(toy)
    optimizer = METHODS[method](made_of, adamw(toy))
    called = second(made_of)
    if layout == "sharded from outside":
        hand_over(optimizer, toy)
    other = together(twin)
    expected = train(METHODS[method](other, adamw(twin)), other, twin, rank=None)
    found = train(optimizer, called, toy, rank=None)
    if layout == "compiled":
        torch.testing.assert_close(found, expected)
        return
    assert found == expected
    assert list(whole_bits(toy).values()) == list(whole_bits(twin).values())


@selection(
    "layout, method",
    [
        *(("ddp", "ACDC"), ("compiled", "CrAM+")),
        *(("blocks checkpointed", "CrAM"), ("sharded from outside", "CrAM+")),
    ],
    tuple(LAYOUTS),
    tuple(METHODS),
)
def test_a_wrapper_put_around_the_model_later_changes_nothing(
    run: Run, layout: str, method: str
) -> None:
    run(2, collected, _wrap, layout, method)


def _evaluate_between(method: str) -> str:
    """Between two steps the outer root is left gathered."""
    toy, twin = small_toy(), small_toy()
    optimizer = METHODS[method](toy, adamw(toy))
    called, other = _shard_outer(toy), _shard_outer(twin)
    hand_over(optimizer, toy)
    after = METHODS[method](other, adamw(twin))
    for step in range(NUM_STEPS):
        for each in (called, other):
            with torch.no_grad():
                each(*make_batch(toy, 9))
        other_loss = train(after, other, twin, range(step, step + 1), rank=None)
        loss: list[Any] = []
        text = said(
            lambda: loss.extend(train(optimizer, called, toy, range(step, step + 1), rank=None))  # noqa: B023
        )
        if text != "nothing":
            return text
        assert loss == other_loss
    for each in (called, other):
        each.reshard()
    assert list(whole_bits(toy).values()) == list(whole_bits(twin).values())
    return "the same"


@pytest.mark.parametrize("method", ["CrAM+", "ACDC"])
def test_an_outer_root_that_stays_gathered_is_no_silent_mistake(run: Run, method: str) -> None:
    for text in run(2, _evaluate_between, method):
        assert text == "the same" or "shard" in text
