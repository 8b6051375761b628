"""Ranks that own different experts: thresholds are of all experts and the rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import qsdp
from qsdp.oneshot.in_memory import compressed
from qsdp.sparsity.masks import magnitude_masks
from tests_distributed.support.expert_methods import NAMES, expected_masks
from tests_distributed.support.experts import (
    EXPERTS,
    LAYOUTS,
    Layout,
    in_blocks,
    is_expert,
    values_of,
)
from tests_distributed.support.helpers import all_ranks, make_model
from tests_distributed.support.running import Run, selection

TARGETS = (0.0, 0.3, 0.5, 0.9)


def _masks(layout: Layout, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    model = layout.shard(**options)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return [magnitude_masks(parameters, sparsity) for sparsity in TARGETS]


STARTS: dict[str, dict[str, Any]] = {"others": {}, "alike": {"alike": True}, "ties": {"tied": True}}


@selection(
    "layout, start",
    [
        *(("two of two", "ties"), ("replicas", "alike")),
        *(("a rank each", "ties"), ("one and two", "others")),
    ],
    NAMES,
    tuple(STARTS),
)
def test_masks_are_those_of_all_experts_and_the_rest_in_one_process(
    run: Run, layout: str, start: str
) -> None:
    chosen, options = LAYOUTS[layout], STARTS[start]
    together = chosen.together(**options)
    expected = [expected_masks(together, together.names(lambda _: True), s) for s in TARGETS]
    for rank, found in enumerate(run(chosen.ranks, _masks, chosen, options)):
        for sparsity, masks, wholes in zip(TARGETS, found, expected, strict=True):
            for name, mask in masks.items():
                whole = wholes[together.name_of(name, rank)]
                assert torch.equal(mask, chosen.part(name, whole, rank)), (sparsity, name)


def _compressed(layout: Layout, patterns: list[str] | None) -> tuple[dict[str, Tensor], bool]:
    """What is zero inside, and whether the weights come back."""
    model = layout.shard(tied=True)
    parameters = dict(model.named_parameters())
    before = values_of(parameters)
    with compressed(model, 0.5, patterns) as chosen:
        zeros = {name: value == 0 for name, value in values_of(chosen).items()}
    after = values_of(parameters)
    return zeros, all(torch.equal(after[name], value) for name, value in before.items())


@selection(
    "layout, prunes",
    [
        *(("two of two", "default"), ("replicas", "experts")),
        *(("a rank each", "experts"), ("one and two", "experts")),
    ],
    NAMES,
    ("default", "experts"),
)
def test_a_model_compressed_in_one_shot_loses_half_over_all_experts(
    run: Run, layout: str, prunes: str
) -> None:
    chosen, patterns = LAYOUTS[layout], None if prunes == "default" else EXPERTS
    together = chosen.together(tied=True)
    names = together.names(lambda n: in_blocks(n) and (patterns is None or is_expert(n)))
    expected = expected_masks(together, names, 0.5)
    for rank, (zeros, is_restored) in enumerate(run(chosen.ranks, _compressed, chosen, patterns)):
        assert is_restored
        assert zeros.keys() == {n for n in zeros if together.name_of(n, rank) in expected}
        assert len(zeros) == (6 if patterns is None else 4)
        for name, mask in zeros.items():
            whole = expected[together.name_of(name, rank)]
            assert torch.equal(~mask, chosen.part(name, whole, rank)), name


def _compressed_beside_frozen(differs: bool) -> dict[str, int]:
    """How many values are zero in each shard, where the first block is frozen on each half."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "gpu"))
    model = make_model(1)
    with torch.no_grad():
        model.blocks[0].requires_grad_(False)
        for parameter in model.blocks[0].parameters():
            parameter.mul_(3 if dist.get_rank() < 2 or not differs else 30)
    fully_shard(model.blocks[0], mesh=mesh["gpu"])
    fully_shard(model, mesh=all_ranks())
    with qsdp.compressed(model, 0.5) as chosen:
        return {name: int((p.to_local() == 0).sum()) for name, p in chosen.items()}


def test_frozen_copies_compete_once_and_different_ones_each(run: Run) -> None:
    plain = make_model(1)
    with torch.no_grad():
        for parameter in plain.blocks[0].parameters():
            parameter.mul_(3)
    with qsdp.compressed(plain, 0.5) as chosen:
        expected = {name: int((p == 0).sum()) for name, p in chosen.items()}
        total = sum(p.numel() for p in chosen.values())
        frozen = sum(p.numel() for name, p in chosen.items() if "blocks.0" in name)
    found = run(4, _compressed_beside_frozen, False)
    for name, count in expected.items():
        ranks = range(2) if "blocks.0" in name else range(4)
        assert sum(found[rank][name] for rank in ranks) == count
    zeros = sum(sum(each.values()) for each in run(4, _compressed_beside_frozen, True))
    assert zeros == round(0.5 * (total + frozen))


def _compress_what_one_rank_froze() -> str:
    model = LAYOUTS["a rank each"].shard()
    if dist.get_rank() == 0:
        model.blocks[0].expert.requires_grad_(False)
    try:
        with qsdp.compressed(model, 0.5):
            return "compressed"
    except RuntimeError as error:
        return str(error)


def test_experts_that_one_rank_froze_are_named(run: Run) -> None:
    for text in run(2, _compress_what_one_rank_froze):
        assert "rank 1 is at qsdp.compressed with trained ones blocks.0.expert." in text
