"""Kept grids beside a warm-up, in which none is drawn, and a budget, which draws some anew."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import qsdp
from tests_distributed.support.delta import (
    bits_of,
    decoded,
    installed,
    named_in_groups,
    num_kept_buckets,
    same_on_all_ranks,
    sent_while,
    take_sgd_step,
)
from tests_distributed.support.helpers import full_state, make_batch
from tests_distributed.support.running import Run, selection
from tests_distributed.support.training import exact_state

NEVER = 1 << 30
"""No schedule draws anew so seldom."""
ALL: dict[str, Any] = {"weight_bits": 4, "grad_bits": 4, "weight_bucket_size": 128}

# --- a warm-up ----------------------------------------------------------------------------------

STEPS = 3


def _warmed(
    gather: str, bits: int | None, validates: bool
) -> tuple[list[Any], list[dict[str, int]], int]:
    """What the first steps come to, what each step adds to the counters, and all buckets."""
    config = {**ALL, "rounding": "dither", "warmup_steps": STEPS, "warmup_bits": bits}
    config |= {"delta_redraw_every": NEVER} if gather == "delta" else {}
    model, handle = installed(1, {**config, "gather": gather}, frozen=True)
    buckets = num_kept_buckets(model, {}, 128, [name for name, _ in model.named_parameters()])
    numbers, counts = list[Any](), []
    for step in range(STEPS + 4):
        loss = list[float]()

        def act(seed: int = step, loss: list[float] = loss) -> None:
            if validates:
                model.eval()
                with torch.no_grad():
                    model(*make_batch(model, 50))
                model.train()
            loss.append(take_sgd_step(model, seed, 1e-3))

        counts.append(sent_while(handle, act))
        if step < STEPS:
            numbers.append((loss, counts[-1]["gather_sent_bytes"], bits_of(exact_state(model))))
    weights, exact = decoded(model), full_state(model)
    assert same_on_all_ranks(weights)
    for name, value in exact.items():
        assert (weights[name] - value).abs().max() < 0.3 * value.abs().max(), name
    return numbers, counts, buckets


@selection(
    ("ranks", "bits", "validates"),
    [(2, None, True), (3, 8, False)],
    (2, 3),
    (None, 6, 8),
    (False, True),
)
def test_a_warm_up_is_that_of_a_wire_that_gathers_once_and_then_all_grids_are_drawn(
    run: Run, ranks: int, bits: int | None, validates: bool
) -> None:
    once = run(ranks, _warmed, "once", bits, validates)
    found = run(ranks, _warmed, "delta", bits, validates)
    for (numbers, counts, buckets), (expected, *_) in zip(found, once, strict=True):
        assert numbers == expected
        assert [each["redrawn_buckets"] for each in counts[: STEPS + 1]] == [0] * STEPS + [buckets]
        assert [each["changed_codes"] for each in counts[: STEPS + 1]] == [0] * (STEPS + 1)
        later = counts[STEPS + 1 :]
        assert sum(each["changed_codes"] for each in later) > 0
        assert max(each["redrawn_buckets"] for each in later) < buckets / 10
        assert later[-1]["gather_sent_bytes"] < counts[STEPS]["gather_sent_bytes"]


# --- a budget -----------------------------------------------------------------------------------

KEPT = "blocks.0.mlp.*.weight"


def _allotted(warmup_steps: int) -> tuple[list[int], int, int, set[str], bool]:
    """Redrawn buckets by step; those of all, and of groups whose bits changed; what changed."""
    config = {"budget": 5.0, "grad_bits": 8, "policy": ((KEPT, (4, 8)),), "bucket_size": 64}
    config |= {"warmup_steps": warmup_steps, "delta_redraw_every": NEVER}
    model, handle = installed(2, config, width=32, hidden=32)
    before = _weight_bits(handle)
    names = [name for name, _ in model.named_parameters()]
    first = num_kept_buckets(model, {}, 64, names)
    redrawn = []
    for step in range(warmup_steps + 4):
        counts = sent_while(handle, partial(take_sgd_step, model, step, 0.0))
        redrawn.append(counts["redrawn_buckets"])
    after = _weight_bits(handle)
    changed = {name for name in before if before[name] != after[name]}
    touched = [group for group in named_in_groups(handle).values() if changed & {*group}]
    later = num_kept_buckets(model, {}, 64, [name for group in touched for name in group])
    assert len({*after.values()}) > 2
    for step in range(2):
        take_sgd_step(model, step, 0.1)
    weights, exact = decoded(model), full_state(model)
    for name, value in exact.items():
        assert (weights[name] - value).abs().max() < value.abs().max(), name
    return redrawn, first, later, changed, same_on_all_ranks(weights)


def _weight_bits(handle: qsdp.Handle) -> dict[str, str]:
    return {row.name: row.weight for row in handle.report().rows if "bits" in row.weight}


@pytest.mark.parametrize("warmup_steps", [0, pytest.param(2, marks=pytest.mark.heavy)])
def test_bits_that_are_allotted_draw_the_groups_anew_whose_bits_are_others(
    run: Run, warmup_steps: int
) -> None:
    for redrawn, first, later, changed, same in run(2, _allotted, warmup_steps):
        assert same
        assert changed
        assert not any(name.startswith("blocks.0.mlp.") for name in changed)
        # What is measured in the first step after the warm-up is allotted before the next one.
        assert redrawn == [*([0] * warmup_steps), first, later, 0, 0]
        assert later < first
