"""Under a support only kept weights have codes; where it changes, and only there, all are drawn."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import qsdp
from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.delta import (
    HEADER_BYTES,
    Masks,
    bits_of,
    decoded,
    installed,
    masks_of,
    named_in_groups,
    num_kept_buckets,
    other_weights,
    prune,
    same_on_all_ranks,
    sent_while,
    support,
    take_sgd_step,
    wide,
)
from tests_distributed.support.helpers import full_grads, full_state, make_batch
from tests_distributed.support.running import Run, selection
from tests_distributed.support.training import State, take_step
from tests_distributed.support.two_replicas import refusal_of

NEVER = 1 << 30
"""No schedule draws anew so seldom."""

# --- bytes ----------------------------------------------------------------------------------------

SETTLED = 7


def _bytes_by_share(shares: list[float]) -> list[tuple[int, int, int]]:
    """For each share that is kept: bytes that draw all, then of a step, and changed codes then."""
    config = {"weight_bits": 8, "grad_bits": 8, "delta_redraw_every": NEVER}
    found = []
    for share in shares:
        model, handle = wide(1, config)
        take_sgd_step(model, 0, 0.0)
        masks = masks_of(model, share)
        prune(model, masks)
        handle.set_support(support(model, masks))
        counts = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for step in range(1, SETTLED):
            counts.append(sent_while(handle, partial(take_step, model, optimizer, step)))
        drawn, last = counts[0], counts[-1]
        sent = "gather_sent_bytes"
        found.append((drawn[sent], last[sent], last["changed_codes"]))
        weights, exact = decoded(model), full_state(model)
        assert same_on_all_ranks(weights)
        for name, value in exact.items():
            assert (weights[name][value == 0].view(torch.int32) == 0).all(), name
            error = (weights[name] - value).abs().max()
            assert error < 0.05 * value.abs().max(), name
    return found


def test_bytes_fall_with_the_share_of_weights_that_is_kept(run: Run) -> None:
    for (all_drawn, moving, changed), (half, half_moving, half_changed), (
        tenth,
        little,
        few,
    ) in run(2, _bytes_by_share, [1.0, 0.5, 0.1]):
        assert half < 0.65 * all_drawn
        assert tenth < 0.3 * all_drawn
        assert moving > half_moving > little
        assert little < 0.6 * moving
        assert few < 0.2 * changed
        assert half_changed < 0.7 * changed


# --- what is pruned is zero -----------------------------------------------------------------------


def _pruned(ranks_keep_nothing: bool) -> tuple[list[State], list[State], State, list[bool]]:
    """By step the decoded weights and whole gradients; the whole masks; are all ranks alike."""
    model, handle = installed(2, {"weight_bits": 4, "bucket_size": 16, "delta_redraw_every": 2})
    take_sgd_step(model, 0, 0.1)
    masks = masks_of(model, 0.3)
    if ranks_keep_nothing and dist.get_rank() == 1:
        masks = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    # One group is pruned to nothing, and another has no mask at all.
    for name in masks:
        if name.startswith("blocks.1.mlp"):
            masks[name] = torch.zeros_like(masks[name])
    masks = {name: mask for name, mask in masks.items() if not name.startswith("blocks.0.mlp")}
    prune(model, masks)
    handle.set_support(support(model, masks))
    weights, grads, same = [], [], []
    for step in range(1, 4):
        torch.autograd.backward(model(*make_batch(model, step)))
        grads.append(full_grads(model))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.1)
                p.grad = None
        prune(model, masks)
        weights.append(decoded(model))
        same.append(same_on_all_ranks(weights[-1]))
    exact = full_state(model)
    near = max(
        float((weights[-1][n] - v).abs().max() / v.abs().max().clamp(1e-30))
        for n, v in exact.items()
    )
    assert near < 0.35
    return weights, grads, {name: exact[name] != 0 for name in masks}, same


@selection("ranks_keep_nothing", [(True,)], (False, True))
def test_pruned_weights_and_their_gradients_are_zero_to_the_bit(
    run: Run, ranks_keep_nothing: bool
) -> None:
    for weights, grads, kept, same in run(3, _pruned, ranks_keep_nothing):
        assert same == [True] * 3
        for found in [*weights, *grads]:
            for name, mask in kept.items():
                assert (found[name][~mask].view(torch.int32) == 0).all(), name
        assert any(mask.any() for mask in kept.values())


# --- when all is drawn ----------------------------------------------------------------------------


def _phases(method: str, bucket: int) -> list[tuple[int, int, bool]]:
    """Of each step the redrawn buckets, those of groups whose support is new, and whether it is."""
    config = {"weight_bits": 4, "bucket_size": bucket, "delta_redraw_every": NEVER}
    model, handle = installed(3, config)
    base = torch.optim.SGD(model.parameters(), lr=0.0)  # nothing leaves its grid
    if method == "ACDC":
        schedule = qsdp.ACDCSchedule(steps=9, warmup=2, phase=2, last_dense=1, last_sparse=2)
        optimizer: Any = qsdp.ACDC(model, base, schedule=schedule, target=0.8)
    else:
        gradual = qsdp.GMPSchedule.of(9, 0.8, start=2, every=2)
        optimizer = qsdp.GMP(model, base, schedule=gradual)
    now: Masks = {}
    is_new = [False]

    def tell(masks: Any, *, with_grads: bool = True) -> None:
        handle.set_support(masks, with_grads=with_grads)
        names = {id(p): name for name, p in model.named_parameters()}
        given = {names[id(p)]: mask.clone() for p, mask in (masks or {}).items()}
        is_new[0] |= bool(given) or bool(now)
        now.clear()
        now.update(given)

    optimizer.share_support(tell)
    groups, found, ever = named_in_groups(handle).values(), [], set[str]()
    for step in range(9):
        ever |= now.keys()
        touched = [names for names in groups if not step or ever & set(names)]
        expected = num_kept_buckets(model, now, bucket, [n for names in touched for n in names])
        was_new, is_new[0] = is_new[0], False
        counts = sent_while(handle, partial(_step, optimizer, model, step))
        found.append((counts["redrawn_buckets"], expected, was_new))
    return found


def _step(optimizer: Any, model: Any, step: int) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(model(*make_batch(model, step)))
    optimizer.step()


@selection(("method", "bucket"), [("ACDC", 16), ("GMP", 128)], ("ACDC", "GMP"), (16, 128))
def test_a_new_phase_draws_all_buckets_that_it_touches_and_no_other_step_does(
    run: Run, method: str, bucket: int
) -> None:
    everyone = run(3, _phases, method, bucket)
    assert everyone == [everyone[0]] * 3
    news = [is_new for *_, is_new in everyone[0]]
    assert 2 <= sum(news) < 7
    for step, (redrawn, expected, is_new) in enumerate(everyone[0]):
        assert redrawn == (expected if is_new or not step else 0), step


def _supports_in_vain() -> list[int]:
    """Buckets drawn in steps before which the support is set, and is what it was in the end."""
    config = {"weight_bits": 4, "bucket_size": 16, "delta_redraw_every": NEVER}
    model, handle = installed(4, config)
    masks, others = masks_of(model, 0.5), masks_of(model, 0.3, seed=1)
    redrawn, seed = [], 0

    def step() -> None:
        nonlocal seed
        seed += 1
        counts = sent_while(handle, partial(take_sgd_step, model, seed, 0.0))
        redrawn.append(counts["redrawn_buckets"])

    def look_aside(change: Masks | None, back: Masks | None) -> None:
        with handle.aside(), other_weights(model), torch.no_grad():
            if change is not None:
                prune(model, change)
            handle.set_support(None if change is None else support(model, change))
            model(*make_batch(model, 90))
            handle.set_support(None if back is None else support(model, back))

    step()
    handle.set_support(None)  # there was none
    step()
    look_aside(others, None)
    step()
    prune(model, masks)
    handle.set_support(support(model, masks))
    step()
    look_aside(others, masks)
    step()
    look_aside(None, masks)
    step()
    handle.set_support(None)
    step()
    step()
    return redrawn


def test_a_support_that_is_what_it_was_after_an_aside_draws_nothing(run: Run) -> None:
    for first, none, aside, masked, others_aside, lifted_aside, lifted, last in run(
        2, _supports_in_vain
    ):
        assert 0 < masked < lifted < first  # of the root's group nothing is pruned
        assert none == aside == others_aside == lifted_aside == last == 0


# --- frozen weights, and a weight outside the mask ------------------------------------------------


def _frozen_and_pruned() -> tuple[bool, float, list[int]]:
    """Whether all decode alike, how far from the exact weights, and bytes by step."""
    config = {"weight_bits": 4, "bucket_size": 16, "delta_redraw_every": 2}
    model, handle = installed(5, config, trained="blocks.1.*")
    masks = masks_of(model, 0.4)
    prune(model, masks)
    handle.set_support(support(model, masks))
    sent = []
    for step in range(4):
        counts = sent_while(handle, partial(_look, model.blocks[0]))
        sent.append(counts["gather_sent_bytes"])
        loss = model(*make_batch(model, step))
        torch.autograd.backward(loss)
        model.zero_grad()
    weights, exact = decoded(model), full_state(model)
    far = max(float((weights[n] - v).abs().max() / v.abs().max()) for n, v in exact.items())
    for name, value in exact.items():
        if name in masks:
            assert torch.equal(weights[name] == 0, value == 0), name
    return same_on_all_ranks(weights), far, sent


def _look(block: Any) -> None:
    block.unshard()
    block.reshard()


def test_frozen_weights_under_a_support_are_sent_once(run: Run) -> None:
    for same, far, sent in run(3, _frozen_and_pruned):
        assert same
        assert far < 0.35
        assert sent[0] > 1.5 * 2 * HEADER_BYTES
        assert sent[-1] <= 2 * HEADER_BYTES


def _stray(odd: int) -> tuple[str, list[bool]]:
    """What this rank says of a weight that a mask does not keep and that is not zero there."""
    model, handle = installed(6, {"weight_bits": 4, "bucket_size": 16})
    masks = masks_of(model, 0.5)
    prune(model, masks)
    handle.set_support(support(model, masks))
    take_sgd_step(model, 0, 0.0)
    values = local_shard(model.get_parameter("blocks.1.qkv.weight")).values
    if dist.get_rank() == odd:
        with torch.no_grad():
            values[~masks["blocks.1.qkv.weight"]] = 0.25
    said = refusal_of(lambda: model(*make_batch(model, 1)))
    prune(model, masks)
    same = []
    for step in range(1, 3):
        take_sgd_step(model, step, 0.0)
        same.append(same_on_all_ranks(decoded(model)))
    return said, same


@selection("odd", [(2,)], (0, 2))
def test_all_ranks_hear_of_a_pruned_weight_that_is_not_zero(run: Run, odd: int) -> None:
    for rank, (said, same) in enumerate(run(3, _stray, odd)):
        assert ("a weight outside the mask is not zero" if rank == odd else f"rank {odd} ") in said
        assert re.fullmatch(r"[^\n]+[^.\n]\.", said)
        assert same == [True, True]


# --- one process's training ---------------------------------------------------------------------


def _told(method: str, is_told: bool) -> tuple[list[float], dict[str, bytes], bool]:
    """Losses of AC/DC or GMP, whose wire may hear of the masks, and the weights in the end."""
    model, handle = installed(7, {"weight_bits": 8, "grad_bits": 32, "embedding_bits": 8})
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    if method == "ACDC":
        schedule = qsdp.ACDCSchedule(steps=6, warmup=1, phase=1, last_dense=1, last_sparse=1)
        optimizer: Any = qsdp.ACDC(model, base, schedule=schedule, target=0.7)
    else:
        gradual = qsdp.GMPSchedule.of(6, 0.7, start=1, every=2)
        optimizer = qsdp.GMP(model, base, schedule=gradual)
    if is_told:
        optimizer.share_support(handle.set_support)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        loss: Tensor = model(*make_batch(model, step))
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    weights = decoded(model)
    exact = full_state(model)
    for name, value in exact.items():
        assert torch.isfinite(value).all()
        assert (weights[name] - value).abs().max() < 0.05 * value.abs().max()
    return losses, bits_of(weights), same_on_all_ranks(weights)


@selection(("ranks", "method"), [(2, "GMP")], (2, 3), ("ACDC", "GMP"))
def test_methods_train_alike_whether_the_wire_hears_of_their_masks_or_not(
    run: Run, ranks: int, method: str
) -> None:
    untold = run(ranks, _told, method, False)
    for (losses, _, same), (expected, *_) in zip(
        run(ranks, _told, method, True), untold, strict=True
    ):
        assert same
        assert losses == pytest.approx(expected, rel=0.02)
