"""Shards that are frozen, unfrozen or looked at in between, on all ranks or on one."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import qsdp
from tests.support.optimizers import (
    MASKED,
    METHODS,
    RARELY_RENEWED,
    WEIGHT,
    adamw,
    assert_masked,
    bits,
    said,
    share_due,
    train,
)
from tests_distributed.support.helpers import (
    all_ranks,
    full_of_all,
    full_state,
    make_batch,
    make_model,
    shard,
)
from tests_distributed.support.running import Run, selection
from tests_distributed.support.small_toy import prepare, small_toy, tell, whole_bits


def _freeze_and_unfreeze(method: str, wire_bits: int | None, unfreeze: bool) -> Any:
    model = small_toy()
    if unfreeze:
        model.get_parameter(WEIGHT).requires_grad_(False)
    shard(model)
    weight: Any = model.get_parameter(WEIGHT)
    optimizer = RARELY_RENEWED[method](model, adamw(model))
    tell(optimizer, model, wire_bits)
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
    return found, whole_bits(model)


@selection("method, unfreeze", [("GMP", True)], MASKED, [True, False])
def test_the_masks_follow_what_is_trained(run: Run, method: str, unfreeze: bool) -> None:
    plain = run(2, _freeze_and_unfreeze, method, None, unfreeze)
    assert run(2, _freeze_and_unfreeze, method, 32, unfreeze) == plain
    run(2, _freeze_and_unfreeze, method, 8, unfreeze)


# --- what one rank reads, and what all warn of --------------------------------------------------


def _read_on_one_rank(odd: int | None) -> Any:
    model = small_toy()
    optimizer = RARELY_RENEWED["GMP"](model, adamw(model))
    prepare(model, optimizer, in_place=True)
    for step in range(4):
        if dist.get_rank() == odd:
            optimizer.masks()
            optimizer.state_dict()
            assert optimizer.prunable.names
        train(optimizer, model, model, range(step, step + 1), rank=None)
        with torch.no_grad():  # the root stays gathered
            model(*make_batch(model, step))
    return whole_bits(model)


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
    model = shard(small_toy())
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
    assert "lacks 1 trained parameter of the model, 'embed.weight'" in first[0]


def _look_while_gathered() -> list[Any]:
    """What is found behind weights that are gathered, where the group of the whole has them all."""
    model = make_model(1, conv1d=True)
    fully_shard(model, mesh=all_ranks())
    optimizer = METHODS["ACDC"](model, adamw(model))
    before = optimizer.prunable
    model.unshard()
    model.head.weight.requires_grad_(False)
    optimizer._tracked.refresh()
    after = optimizer.prunable
    return [
        before.dims == after.dims == (0,) * len(before.names),
        all(map(operator.is_, before.parameters, after.parameters)),
        not any(parameter is p for parameter in after.parameters for p in model.parameters()),
    ]


def test_shards_are_found_behind_gathered_weights(run: Run) -> None:
    assert run(2, _look_while_gathered) == [[True, True, True]] * 2
