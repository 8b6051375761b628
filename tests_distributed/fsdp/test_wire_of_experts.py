"""Ranks that own different experts, on the wire: all experts are measured and pruned."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import qsdp
from tests_distributed.support.expert_methods import EVEN, METHODS
from tests_distributed.support.experts import (
    LAYOUTS,
    Layout,
    backward_on_rank,
    in_blocks,
    is_expert,
    take_steps,
    train,
)
from tests_distributed.support.running import Run, selection

WIDE: dict[str, Any] = {"width": 32, "hidden": 24}
NEAREST: dict[str, Any] = {"bucket_size": 64, "rounding": "nearest"}
CONFIGS: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "budget": {**NEAREST, "budget": 5.5},
    "learned": {**NEAREST, "weight_bits": 4, "grad_bits": 4}
    | {"levels": "learned", "level_steps": (1, 2)},
}


@torch.no_grad()
def _on_the_wire(layout: Layout, config: dict[str, Any], method: str) -> dict[str, Any]:
    model = layout.shard(**WIDE)
    handle = qsdp.install(model, qsdp.QSDPConfig(**{**NEAREST, **config}))
    chosen = METHODS[method]
    optimizer = chosen.around(model)
    optimizer.share_support(handle.set_support)
    with handle.measuring():
        trail = take_steps(chosen, model, optimizer, partial(backward_on_rank, model))
    errors, parameters = handle.errors(), dict(model.named_parameters())
    exact = {name: p.full_tensor() for name, p in parameters.items()}
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in groups:
        module.unshard()
    pairs = [(name, p.detach().double(), exact[name]) for name, p in model.named_parameters()]
    squares = {
        name: [(sent - value).square().sum().item(), value.double().square().sum().item()]
        for name, sent, value in pairs
    }
    for module in groups:
        module.reshard()
    rows = [(row.name, row.weight, row.grad) for row in handle.report().rows]
    return {"errors": errors, "squares": squares, "trail": trail, "rows": rows}


@selection(
    "layout, config",
    [
        *(("two of two", "budget"), ("replicas", "learned"), ("a rank each", "8 bits")),
    ],
    EVEN,
    tuple(CONFIGS),
)
def test_the_wire_measures_all_experts(run: Run, layout: str, config: str) -> None:
    chosen, method = LAYOUTS[layout], "ACDC" if config == "8 bits" else "CrAM+"
    results = run(chosen.ranks, _on_the_wire, chosen, CONFIGS[config], method)
    for found in results:
        assert found["errors"] == results[0]["errors"]
        assert found["rows"] == results[0]["rows"]
        assert found["trail"].skipped == 0
    for name, errors in results[0]["errors"].items():
        # What one rank has alone does not travel.
        ranks = [own[0] for own in chosen.owners if len(own) > 1] if is_expert(name) else [0]
        parts = [results[rank]["squares"][name] for rank in ranks]
        error, square = (sum(column) for column in zip([0.0, 1e-60], *parts, strict=True))
        said = errors["weight"]
        assert math.sqrt(error / square) == pytest.approx(said or 0.0, rel=1e-4), name
        is_coded = in_blocks(name) or name == "head.weight"
        assert (said is not None) == (is_coded and bool(parts)), name
    if config != "8 bits":
        return
    together = chosen.together(**WIDE)
    trail = train(METHODS[method], together, together.backward)
    for rank, found in enumerate(results):
        for name, value in found["trail"].values.items():
            whole = trail.values[together.name_of(name, rank)]
            off = (value - chosen.part(name, whole, rank)).abs().sum()
            assert off <= 0.01 * value.numel(), name


@selection("layout", [("a rank each",)], EVEN)
def test_on_the_wire_exactly_so_many_weights_of_all_experts_are_pruned(
    run: Run, layout: str
) -> None:
    chosen = LAYOUTS[layout]
    trails = [r["trail"] for r in run(chosen.ranks, _on_the_wire, chosen, {}, "ACDC")]
    together = chosen.together(**WIDE)
    names = together.names(in_blocks)
    total = sum(together.get_parameter(name).numel() for name in names)
    zeros = sum(
        int((value == 0).sum())
        for rank, trail in enumerate(trails)
        for name, value in trail.values.items()
        if in_blocks(name) and chosen.counts(name, rank)
    )
    assert zeros == round(0.9 * total)


def _install_on_uneven_submeshes() -> str:
    try:
        qsdp.install(LAYOUTS["one and two"].shard())
    except RuntimeError as error:
        return str(error)
    return "installed"


def test_the_wire_refuses_submeshes_of_different_sizes(run: Run) -> None:
    said = (
        r"rank 1 has the group of blocks\.0\.expert\..* over 2 ranks but rank 0 has it over 1 ranks"
    )
    for message in run(3, _install_on_uneven_submeshes):
        assert re.match(said, message)
