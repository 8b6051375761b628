"""Replicas that keep codes: they stay alike, and one that has lost its codes is not left alone."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import qsdp
from qsdp import ops
from tests_distributed.support.delta import (
    bits_of,
    decoded,
    fails_to_apply,
    masks_of,
    prune,
    same_on_all_ranks,
    support,
    take_sgd_step,
)
from tests_distributed.support.helpers import full_state, make_batch, make_model, shard
from tests_distributed.support.running import Run, selection
from tests_distributed.support.training import exact_state
from tests_distributed.support.two_replicas import refusal_of

CONFIG: dict[str, Any] = {"weight_bits": 4, "grad_bits": 8, "bucket_size": 64}


def _replicated(native: bool, **options: Any) -> tuple[Any, qsdp.Handle]:
    """Two replicas of two ranks, averaged by FSDP2 (``native``) or by qsdp."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(make_model(1, **options), mesh=mesh if native else mesh["shard"])
    config = qsdp.QSDPConfig(gather="delta", **{"delta_redraw_every": 3, **CONFIG})
    return model, qsdp.install(model, config, replicate_mesh=None if native else mesh["replicate"])


def _trained(native: bool, validates: int | None) -> tuple[list[Any], list[bool]]:
    """What a training leaves, beside which a replica may validate alone; are all alike."""
    model, handle = _replicated(native, frozen=True)
    numbers, same = list[Any](), []
    for step in range(5):
        if validates == dist.get_rank() // 2:
            model.eval()
            with torch.no_grad():
                model(*make_batch(model, 50))
            with handle.aside(), torch.no_grad():
                model(*make_batch(model, 51))
            model.train()
        numbers.append(take_sgd_step(model, step, 0.1))
        if step % 2:
            weights = decoded(model)
            same.append(same_on_all_ranks(weights))
            numbers.append(bits_of(weights))
    exact = full_state(model)
    weights = decoded(model)
    for name, value in exact.items():
        assert (weights[name] - value).abs().max() < 0.3 * value.abs().max()
    handle.remove()
    return [*numbers, bits_of(exact_state(model))], same


@selection("native", [(False,)], (True, False))
def test_replicas_decode_the_same_weights_also_where_one_validates_alone(
    run: Run, native: bool
) -> None:
    plain = run(4, _trained, native, None)
    for (found, same), (expected, _) in zip(run(4, _trained, native, 1), plain, strict=True):
        assert same == [True, True]
        assert found == expected


def _parted(native: bool, how: str, odds: tuple[int, ...]) -> dict[str, Any]:
    """What this rank says after a replica has lost its codes, and how all go on."""
    model, handle = _replicated(native)
    for step in range(2):
        take_sgd_step(model, step, 0.1)
    rank = dist.get_rank()
    if rank // 2 == odds[0] // 2:
        if how == "loads":
            handle.load_state_dict(handle.state_dict())
        else:  # it evaluates alone
            with torch.no_grad():
                if rank in odds:
                    with fails_to_apply(model, LookupError), pytest.raises(LookupError):
                        model(*make_batch(model, 2))
                else:
                    model(*make_batch(model, 2))
    said, losses = list[str](), list[float]()
    for step in range(2, 7):
        try:
            losses.append(take_sgd_step(model, step, 0.1))
        except RuntimeError as error:
            said.append(str(error))
            model.zero_grad()
    present = torch.ones(())
    dist.all_reduce(present)  # no collective is half done
    assert present == 4
    weights, exact = decoded(model), full_state(model)
    for name, value in exact.items():
        assert (weights[name] - value).abs().max() < 0.3 * value.abs().max()
    return {"said": said, "same": same_on_all_ranks(weights), "losses": losses}


@selection(
    ("native", "how", "odds"),
    [(True, "loses", (2, 3)), (False, "loads", (2, 3))],
    (False, True),
    ("loses", "loads"),
    ((1,), (2, 3)),
)
def test_all_replicas_hear_of_one_that_has_lost_its_codes_and_go_on_alike(
    run: Run, native: bool, how: str, odds: tuple[int, ...]
) -> None:
    if how == "loads":  # a state is loaded by a whole replica
        odds = (odds[0] // 2 * 2, odds[0] // 2 * 2 + 1)
    everyone = run(4, _parted, native, how, odds)
    for found in everyone:
        # Whoever has lost some says so; then all that have others are asked to forget theirs.
        assert 1 <= len(found["said"]) <= 2
        assert len(found["said"]) == len(everyone[0]["said"])
        for sentence in found["said"]:
            assert "codes" in sentence
            assert re.fullmatch(r"[^\n]+[^.\n]\.", sentence)
        assert found["same"]
        assert len(found["losses"]) >= 3
        assert all(map(math.isfinite, found["losses"]))


def _train_inside_alone(native: bool, odds: tuple[int, ...], crosses: bool) -> tuple[str, bool]:
    """What is said where ranks ``odds`` alone train inside an aside, or enter one halfway."""
    model, handle = _replicated(native)
    take_sgd_step(model, 0, 0.1)
    is_odd = dist.get_rank() in odds

    def act() -> None:
        with handle.aside() if is_odd and not crosses else nullcontext():
            loss = model(*make_batch(model, 1))
            with handle.aside() if is_odd and crosses else nullcontext():
                torch.autograd.backward(loss)

    said = refusal_of(act)
    present = torch.ones(())
    dist.all_reduce(present)  # no collective is half done
    assert present == 4
    model.zero_grad()
    for step in range(2, 4):
        take_sgd_step(model, step, 0.1)
    return said, same_on_all_ranks(decoded(model))


@selection(
    ("native", "odds", "crosses"),
    [(False, (2, 3), False), (True, (0,), True)],
    (False, True),
    ((0,), (2, 3)),
    (False, True),
)
def test_all_replicas_hear_of_ranks_that_train_inside_an_aside_alone(
    run: Run, native: bool, odds: tuple[int, ...], crosses: bool
) -> None:
    for said, same in run(4, _train_inside_alone, native, odds, crosses):
        assert "aside" in said
        assert re.fullmatch(r"[^\n]+[^.\n]\.", said)
        assert same


def _masked(native: bool) -> list[bool]:
    """Whether all ranks decode the same under a support, after steps of it and of none."""
    model, handle = _replicated(native)
    same = []
    for share in (0.5, None):
        if share is not None:
            # Replicas hold the same shards, and keep the same of them.
            generator = torch.Generator().manual_seed(dist.get_rank() % 2)
            masks = {
                name: torch.rand(mask.shape, generator=generator) < share
                for name, mask in masks_of(model, share).items()
            }
            prune(model, masks)
            handle.set_support(support(model, masks))
        else:
            handle.set_support(None)
        for step in range(2):
            take_sgd_step(model, step, 0.0)
        same.append(same_on_all_ranks(decoded(model)))
    return same


@selection("native", [(False,)], (False, True))
def test_replicas_are_alike_under_a_support(run: Run, native: bool) -> None:
    assert run(4, _masked, native) == [[True, True]] * 4


def _cannot_encode(native: bool) -> str:
    """What this rank says where the codec fails on rank 0 in a forward pass."""
    model, _ = _replicated(native)
    take_sgd_step(model, 0, 0.1)
    fails = mock.patch.object(ops, "encode_changes", side_effect=RuntimeError("no memory."))
    with fails if dist.get_rank() == 0 else nullcontext():
        return refusal_of(lambda: take_sgd_step(model, 1, 0.1))


@selection("native", [(False,)], (False, True))
def test_replicas_hear_of_a_rank_that_cannot_make_its_frame(run: Run, native: bool) -> None:
    own, mate, *others = run(4, _cannot_encode, native)
    assert own == "no memory."
    assert re.fullmatch(r"rank 0 cannot send its part of the group of .*\.", mate)
    for rank, said in enumerate(others):
        assert said.startswith(f"rank {rank} cannot do what the others do at a backward pass: ")
