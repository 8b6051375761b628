"""An optimizer made before its model is sharded, wrapped or loaded anew trains as one made after
it, once it was given the model's parameters; until then every rank refuses to step."""

from __future__ import annotations

import gc
import operator
import warnings
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
    RARELY_RENEWED,
    TWO_PASSES,
    WEIGHT,
    Holder,
    adamw,
    all_bits,
    assert_masked,
    bits,
    closure_of,
    compiled,
    hand_over,
    said,
    share_due,
    train,
    with_blocks,
)
from tests_distributed.conftest import Run, selection
from tests_distributed.support.helpers import (
    Toy,
    all_ranks,
    full_of_all,
    full_state,
    make_batch,
    make_model,
    shard,
    wire_config,
)

PRELOADED = ["torch._dynamo.backends.common"]


def collected(function: Callable[..., Any], *args: Any) -> Any:
    """Call it, and let go of its DDP, which an optimizer and its base hold in a cycle, while there
    is a process group: a collector that ends the group waits for threads that wait for it."""
    result = function(*args)
    gc.collect()
    return result


def _toy() -> Toy:
    return make_model(1, num_layers=1)


def _whole(model: nn.Module) -> dict[str, Any]:
    """Bits of the whole weights (a collective)."""
    return all_bits(full_state(model))


def _told(optimizer: Any, model: nn.Module, wire_bits: int | None) -> None:
    if wire_bits is not None:
        config = wire_config(16, weight_bits=wire_bits, grad_bits=wire_bits)
        optimizer.share_support(qsdp.install(model, config).set_support)


def _prepare(model: Toy, optimizer: Any, in_place: bool) -> None:
    """What libraries do that prepare model and optimizer together."""
    names = {id(p): name for name, p in model.named_parameters()}
    slots = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    shard(model)
    sharded = dict(model.named_parameters())
    for group, slot in zip(optimizer.param_groups, slots, strict=True):
        if in_place:
            for i, name in enumerate(slot):
                group["params"][i] = sharded[name]
        else:
            group["params"] = [sharded[name] for name in slot]


# --- made before the sharding -------------------------------------------------------------------


def _trained(method: str, wire_bits: int | None, order: str) -> tuple[Any, Any, int]:
    """Losses and `pruned`; the weights; and how many of the whole parameters outlived the swap."""
    model = _toy()
    whole = [weakref.ref(parameter) for parameter in model.parameters()]
    if order == "made afterwards":
        shard(model)
        optimizer = METHODS[method](model, adamw(model))
    else:
        optimizer = METHODS[method](model, adamw(model))
        _prepare(model, optimizer, in_place=order == "swapped in place")
    gc.collect()
    num_alive = sum(parameter() is not None for parameter in whole)
    _told(optimizer, model, wire_bits)
    found = train(optimizer, model, model, range(1), rank=None)
    found += train(optimizer, model, model, range(1, NUM_STEPS), rank=None)
    return found, _whole(model), num_alive


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
        *(("CrAM", 8), ("SAM", None), ("ACDC", None), ("ACDC", 8), ("GMP", None)),
    ],
    tuple(METHODS),
    [None, 8],
)
def test_an_optimizer_from_before_the_sharding_trains_as_one_from_after_it(
    run: Run, method: str, wire_bits: int | None
) -> None:
    run(3 if (method, wire_bits) == ("ACDC", 8) else 2, _compare_orders, method, wire_bits)


def _zeros_when_made_before() -> float:
    model = _toy()
    optimizer = METHODS["ACDC"](model, adamw(model))
    _prepare(model, optimizer, in_place=True)
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
        model = _toy()
        optimizer = METHODS[method](model, adamw(model))
        shard(model)
        before = _whole(model)
        closure = closure_of(model, model, 0, None)
        if not with_closure:
            closure()
        found[method] = said(lambda: optimizer.step(closure if with_closure else None))  # noqa: B023
        assert _whole(model) == before, method
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
        model = _toy()
        optimizer = make(model, adamw(model), dist.get_rank() == 1)
        _prepare(model, optimizer, in_place=True)
        before = _whole(model)
        texts = [said(lambda: optimizer.step(closure_of(model, model, 0, None))) for _ in "12"]  # noqa: B023
        found[name] = texts[0], texts[1]
        assert _whole(model) == before, name
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
    return shard(_toy().to("meta"))


WAYS: dict[str, tuple[Callable[[], Toy], Callable[[Toy], None]]] = {
    "assign": (lambda: shard(_toy()), _assign),
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
        before = _whole(model)
        text = said(lambda: optimizer.step(closure_of(model, model, 0, None)))
        assert _whole(model) == before
        hand_over(optimizer, model)
    expected = train(METHODS[method](twin, adamw(twin)), twin, twin, rank=None)
    assert train(optimizer, model, model, rank=None) == expected
    assert _whole(model) == _whole(twin)
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
        model = shard(_toy())
        optimizer = METHODS[method](model, adamw(model))
        train(optimizer, model, model, range(steps), rank=None)
        if dist.get_rank() == odd:
            _assign(model)
        before = _whole(model)
        found[method] = said(lambda: optimizer.step(closure_of(model, model, 0, None)))  # noqa: B023
        assert _whole(model) == before, method
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
        model = shard(_toy())
        optimizer = METHODS[method](model, adamw(model))
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in _toy().parameters()]))
        optimizer.param_groups[0]["params"] = [flat]
        closure = closure_of(model, model, 0, None)
        if not with_closure:
            closure()
            flat.grad = torch.ones_like(flat)
        before, flat_before = _whole(model), bits(flat)
        found[method] = said(lambda: optimizer.step(closure if with_closure else None))  # noqa: B023
        assert (_whole(model), bits(flat)) == (before, flat_before), method
    return found


@pytest.mark.parametrize("with_closure", [True, False])
def test_a_flat_partition_in_their_place_is_refused(run: Run, with_closure: bool) -> None:
    for found in run(2, _refuse_flat, with_closure):
        for method, text in found.items():
            assert text != "nothing", method
            assert "\n" not in text


def _swap_amid_training(method: str, steps: int) -> str:
    model = shard(_toy())
    optimizer = METHODS[method](model, adamw(model))
    train(optimizer, model, model, range(steps), rank=None)
    _assign(model)
    hand_over(optimizer, model)
    before = _whole(model)
    text = said(lambda: optimizer.step(closure_of(model, model, steps, None)))
    assert _whole(model) == before
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
    toy, twin = _toy(), _toy()
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
    assert list(_whole(toy).values()) == list(_whole(twin).values())


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
    toy, twin = _toy(), _toy()
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
    assert list(_whole(toy).values()) == list(_whole(twin).values())
    return "the same"


@pytest.mark.parametrize("method", ["CrAM+", "ACDC"])
def test_an_outer_root_that_stays_gathered_is_no_silent_mistake(run: Run, method: str) -> None:
    for text in run(2, _evaluate_between, method):
        assert text == "the same" or "shard" in text


# --- frozen and unfrozen ------------------------------------------------------------------------


def _freeze_and_unfreeze(method: str, wire_bits: int | None, unfreeze: bool) -> Any:
    model = _toy()
    if unfreeze:
        model.get_parameter(WEIGHT).requires_grad_(False)
    shard(model)
    weight: Any = model.get_parameter(WEIGHT)
    optimizer = RARELY_RENEWED[method](model, adamw(model))
    _told(optimizer, model, wire_bits)
    found = train(optimizer, model, model, range(2), rank=None)
    weight.requires_grad_(unfreeze)
    before = bits(weight.to_local())
    found += train(optimizer, model, model, range(2, 5), rank=None)
    for step in range(5, 7):
        masks = full_of_all(optimizer.masks())
        assert (WEIGHT in masks) == unfreeze
        whole = full_state(model)
        assert_masked(share_due(optimizer), masks, {name: whole[name] for name in masks})
        found += train(optimizer, model, model, range(step, step + 1), rank=None)
    assert unfreeze or bits(weight.to_local()) == before
    found += train(optimizer, model, model, range(7, 9), rank=None)
    assert unfreeze or bits(weight.to_local()) == before
    return found, _whole(model)


@selection("method, unfreeze", [("GMP", True)], MASKED, [True, False])
def test_the_masks_follow_what_is_trained(run: Run, method: str, unfreeze: bool) -> None:
    plain = run(2, _freeze_and_unfreeze, method, None, unfreeze)
    assert run(2, _freeze_and_unfreeze, method, 32, unfreeze) == plain
    run(2, _freeze_and_unfreeze, method, 8, unfreeze)


# --- what a step is given -----------------------------------------------------------------------


def _refuse_without_closure() -> dict[str, tuple[str, bool]]:
    found = {}
    for method in TWO_PASSES:
        model = shard(_toy())
        optimizer = METHODS[method](model, adamw(model))
        closure_of(model, model, 0, None)()

        def seen(model: Any = model) -> Any:
            return [(bits(p.to_local()), bits(p.grad.to_local())) for p in model.parameters()]

        before = seen()
        text = said(optimizer.step)
        found[method] = text, seen() == before and not optimizer.state
    return found


def test_two_passes_need_a_closure_on_every_rank(run: Run) -> None:
    for found in run(2, _refuse_without_closure):
        for text, is_unchanged in found.values():
            assert "closure" in text
            assert is_unchanged


FROM_BEFORE = ("every rank", "rank 1", "one rank, one shard", "held back")


def _refuse_micro_batches(which: str, method: str) -> str:
    model: Any = shard(_toy())
    twin: Any = shard(_toy())
    optimizer = METHODS[method](model, adamw(model))
    first = closure_of(model, model, 7, None)
    if which == "held back":
        model.set_requires_gradient_sync(False)
        first()
        model.set_requires_gradient_sync(True)
    else:
        first()
        if which == "rank 1" and dist.get_rank() != 1:
            model.zero_grad()
        if which == "one rank, one shard":
            for name, parameter in model.named_parameters():
                if dist.get_rank() != 1 or name != "blocks.0.qkv.weight":
                    parameter.grad = None

    def seen() -> Any:
        return [
            (bits(p.to_local()), None if p.grad is None else bits(p.grad.to_local()))
            for p in model.parameters()
        ]

    before = seen()
    text = said(lambda: optimizer.step(closure_of(model, model, 0, None)))
    assert seen() == before
    assert optimizer.num_steps == 0
    if which == "held back":  # they are still there
        twin.set_requires_gradient_sync(False)
        closure_of(twin, twin, 7, None)()
        twin.set_requires_gradient_sync(True)
        for each in (model, twin):
            closure_of(each, each, 8, None)()
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert bits(parameter.grad.to_local()) == bits(other.grad.to_local())
        twin = shard(_toy())
    optimizer.zero_grad()
    expected = train(METHODS[method](twin, adamw(twin)), twin, twin, range(2), rank=None)
    assert train(optimizer, model, model, range(2), rank=None) == expected
    assert _whole(model) == _whole(twin)
    return text


@selection(
    "method, which",
    [*(("CrAM+", which) for which in FROM_BEFORE), ("SAM", "held back")],
    ["CrAM+", "SAM"],
    FROM_BEFORE,
)
def test_gradients_of_earlier_micro_batches_are_refused_by_all(
    run: Run, method: str, which: str
) -> None:
    for text in run(2, _refuse_micro_batches, which, method):
        assert "micro-batch" in text


def _refuse_micro_batches_under_ddp() -> str:
    toy = _toy()
    model = DistributedDataParallel(toy)
    optimizer = METHODS["CrAM+"](model, adamw(toy))
    with model.no_sync():
        closure_of(model, toy, 0, None)()
    return said(lambda: optimizer.step(closure_of(model, toy, 1, None)))


def test_gradients_of_earlier_micro_batches_are_refused_under_ddp(run: Run) -> None:
    for text in run(2, collected, _refuse_micro_batches_under_ddp):
        assert "micro-batch" in text


def _add_to_gradients(method: str, held_back: bool) -> None:
    """With a closure for the last micro-batch, or with none."""
    models = [shard(_toy()), shard(_toy())]
    for model, is_split in zip(models, (True, False), strict=True):
        optimizer = METHODS[method](model, adamw(model))
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            model.set_requires_gradient_sync(not held_back)  # type: ignore[operator]
            closure_of(model, model, 2 * step, None)()
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
            last = closure_of(model, model, 2 * step + 1, None)
            if is_split:
                optimizer.step(last)
            else:
                last()
                optimizer.step()
    assert _whole(models[0]) == _whole(models[1])


@pytest.mark.parametrize("held_back", [False, True])
@pytest.mark.parametrize("method", MASKED)
def test_a_closures_gradient_is_added_to_those_that_are_there(
    run: Run, method: str, held_back: bool
) -> None:
    run(2, _add_to_gradients, method, held_back)


# --- what one rank reads, and what all warn of --------------------------------------------------


def _read_on_one_rank(odd: int | None) -> Any:
    model = _toy()
    optimizer = RARELY_RENEWED["GMP"](model, adamw(model))
    _prepare(model, optimizer, in_place=True)
    for step in range(4):
        if dist.get_rank() == odd:
            optimizer.masks()
            optimizer.state_dict()
            assert optimizer.prunable.names
        train(optimizer, model, model, range(step, step + 1), rank=None)
        with torch.no_grad():  # the root stays gathered
            model(*make_batch(model, step))
    return _whole(model)


def test_one_rank_may_look_for_itself(run: Run) -> None:
    assert run(2, _read_on_one_rank, 1) == run(2, _read_on_one_rank, None)


def _freeze_different_blocks() -> str:
    model = shard(make_model(1, num_layers=2))
    optimizer = METHODS["ACDC"](model, adamw(model))
    model.blocks[dist.get_rank()].requires_grad_(False)
    return said(optimizer.step)


def test_ranks_that_train_different_parameters_are_told_which(run: Run) -> None:
    for text in run(2, _freeze_different_blocks):
        assert "rank 1 is at ACDC.step with prunable parameters blocks.0." in text
        assert "blocks.0." in text


def _warn_as_errors() -> list[str]:
    texts = []
    model = shard(_toy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            try:
                qsdp.SAM(model, torch.optim.SGD([*model.parameters()][1:], lr=0.1))
            except UserWarning as warning:
                texts.append(str(warning))
    return texts


def test_where_warnings_are_errors_every_rank_has_them(run: Run) -> None:
    first, second = run(2, _warn_as_errors)
    assert first == second
    assert len(first) == 2
    assert "lacks 1 trained parameters of the model, 'embed.weight'" in first[0]


def _look_while_gathered() -> list[Any]:
    """What is found behind weights that are gathered, where the group of the whole has them all."""
    model = make_model(1, conv1d=True)
    fully_shard(model, mesh=all_ranks())
    optimizer = METHODS["ACDC"](model, adamw(model))
    before = optimizer.prunable
    model.unshard()
    model.head.weight.requires_grad_(False)
    optimizer._known.renew()
    after = optimizer.prunable
    return [
        before.dims == after.dims == (0,) * len(before.names),
        all(map(operator.is_, before.parameters, after.parameters)),
        not any(parameter is p for parameter in after.parameters for p in model.parameters()),
    ]


def test_shards_are_found_behind_gathered_weights(run: Run) -> None:
    assert run(2, _look_while_gathered) == [[True, True, True]] * 2
