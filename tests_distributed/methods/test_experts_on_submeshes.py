"""Ranks that own different experts take the steps of one process.

That process has the shared weights and all experts.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import qsdp
from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.cram.optimizer import CrAM
from tests_distributed.support.expert_methods import EVEN, METHODS, NAMES, PHASES, expected_masks
from tests_distributed.support.experts import (
    LAYOUTS,
    Layout,
    Method,
    Trail,
    backward_on_rank,
    in_blocks,
    take_steps,
    train,
    values_of,
)
from tests_distributed.support.running import Run, selection

EXACT = {"weight_bits": 32, "grad_bits": 32}


def _train(layout: Layout, name: str, config: dict[str, Any] | None) -> Trail:
    method = METHODS[name]
    model = layout.shard(frozen=method.frozen)
    optimizer = None
    if config is not None:
        handle = qsdp.install(model, qsdp.QSDPConfig(**config))
        optimizer = method.around(model)
        optimizer.share_support(handle.set_support)
    optimizer = optimizer or method.around(model)
    return take_steps(method, model, optimizer, partial(backward_on_rank, model))


def _compare_with_one_process(
    layout: Layout, method: str, trails: list[Trail], **options: Any
) -> None:
    chosen = METHODS[method]
    together = layout.together(frozen=chosen.frozen, **options)
    expected = train(chosen, together, together.backward)
    assert expected.skipped == 0
    if "max_norm" in chosen.options:
        assert max(expected.norms) > chosen.options["max_norm"], "nothing was clipped"
    for rank, trail in enumerate(trails):
        assert trail.skipped == 0
        assert trail.norms == pytest.approx(expected.norms, abs=1e-6)
        for zeros, wholes in zip(trail.zeros, expected.zeros, strict=True):
            for name, mask in zeros.items():
                whole = wholes[together.name_of(name, rank)]
                assert torch.equal(mask, layout.part(name, whole, rank)), name
        for name, value in trail.values.items():
            whole = expected.values[together.name_of(name, rank)]
            torch.testing.assert_close(value, layout.part(name, whole, rank), rtol=0, atol=1e-6)


@selection(
    "layout, method",
    [
        *(("two of two", each) for each in ("CrAM+", "ACDC around experts")),
        ("replicas", "ACDC"),
        *(("one and two", each) for each in ("CrAM, normalized", "CrAM of experts")),
        *(("a rank each", each) for each in ("SAM", "GMP by layer")),
    ],
    NAMES,
    tuple(METHODS),
)
def test_a_step_is_that_of_one_process_with_all_experts(run: Run, layout: str, method: str) -> None:
    chosen = LAYOUTS[layout]
    _compare_with_one_process(chosen, method, run(chosen.ranks, _train, chosen, method, None))


@selection(
    "layout, method",
    [("a rank each", "CrAM+"), ("a rank each", "ACDC")],
    EVEN,
    ("ACDC", "CrAM+", "GMP"),
)
def test_telling_the_wire_changes_no_step(run: Run, layout: str, method: str) -> None:
    chosen = LAYOUTS[layout]
    _compare_with_one_process(chosen, method, run(chosen.ranks, _train, chosen, method, EXACT))


def _zeros_of_ties(layout: Layout, method: str) -> Trail:
    model = layout.shard(tied=True)
    return _resting(method, model, partial(backward_on_rank, model))


RESTING = {
    "CrAM+": Method(make=CrAM, options={"sparsity": 0.5, "rho": 0.0}, steps=1),
    "ACDC": Method(make=ACDC, options={"schedule": PHASES, "target": 0.3}, steps=2),
}


def _resting(method: str, model: nn.Module, backward: Any) -> Trail:
    """Steps of no length: ties stay ties."""
    chosen = RESTING[method]
    return take_steps(chosen, model, chosen.around(model, lr=0.0), backward)


@selection(
    "layout, method",
    [
        *(("two of two", "ACDC"), ("replicas", "CrAM+")),
        *(("a rank each", "CrAM+"), ("one and two", "ACDC")),
    ],
    NAMES,
    tuple(RESTING),
)
def test_of_equal_magnitudes_those_of_the_first_ranks_stay(
    run: Run, layout: str, method: str
) -> None:
    chosen = LAYOUTS[layout]
    together = chosen.together(tied=True)
    names = together.names(in_blocks)
    expected = expected_masks(together, names, 0.5 if method == "CrAM+" else 0.3)
    for rank, trail in enumerate(run(chosen.ranks, _zeros_of_ties, chosen, method)):
        for name, mask in trail.zeros[-1].items():
            whole = expected.get(together.name_of(name, rank))
            assert (whole is not None) == in_blocks(name)
            if whole is not None:
                assert torch.equal(~mask, chosen.part(name, whole, rank)), name


# Gradients that are not finite


@torch.no_grad()
def _poisoned(layout: Layout, method: str, base_has: str, bad_call: int) -> dict[str, Any]:
    """One bad gradient of the last sub-mesh's experts, on one of its ranks.

    It is in a pass of CrAM's first step or in a step of another method.
    """
    model = layout.shard()
    options = {} if method == "CrAM" else METHODS[method].options
    make = METHODS[method].make
    chosen = Method(make=make, options=options, prunes="experts", base_has=base_has)
    optimizer, calls = chosen.around(model), 0
    parameters = dict(model.named_parameters())

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = backward_on_rank(model, calls)
        if calls == bad_call and dist.get_rank() == layout.owners[-1][0]:
            model.blocks[1].expert.up.bias.grad.to_local()[0] = math.nan
        return loss

    for _ in range(1 if method == "CrAM" else bad_call):
        before = values_of(parameters)
        model.zero_grad()
        optimizer.step(closure)
    after = values_of(parameters)
    found = {
        "calls": calls,
        "skipped": optimizer.skipped_steps,
        "norm": optimizer.last_grad_norm,
        # A phase that begins then prunes all the same.
        "changed": [
            name
            for name, value in before.items()
            if not ((after[name] == value) | (after[name] == 0) & (method != "CrAM")).all()
        ],
    }
    model.zero_grad()
    optimizer.step(closure)
    return found | {"is trained later": not torch.equal(values_of(parameters)[BIAS], after[BIAS])}


BIAS = "blocks.0.expert.down.bias"


@selection(
    "layout, base_has, method, bad_call",
    [
        *(("two of two", "all", "CrAM", 1), ("two of two", "experts", "CrAM", 2)),
        *(("a rank each", "experts", "CrAM", 1), ("a rank each", "experts", "ACDC", 1)),
        *(("one and two", "experts", "GMP", 1), ("replicas", "experts", "CrAM", 1)),
    ],
    NAMES,
    ("all", "experts"),
    ("CrAM", "ACDC", "GMP"),
    (1, 2),
)
def test_a_bad_gradient_of_one_expert_skips_the_step_on_all_ranks(
    run: Run, layout: str, base_has: str, method: str, bad_call: int
) -> None:
    chosen = LAYOUTS[layout]
    for found in run(chosen.ranks, _poisoned, chosen, method, base_has, bad_call):
        assert found["calls"] == bad_call
        assert found["skipped"] == 1
        assert not math.isfinite(found["norm"])
        assert found["changed"] == []
        assert found["is trained later"]
