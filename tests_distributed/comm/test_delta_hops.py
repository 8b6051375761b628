"""Frames that go over two hops: the weights of a flat gather, for fewer bytes between nodes."""

from __future__ import annotations

from typing import Any

import torch

from qsdp.comm.traffic import LINKS
from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.delta import (
    bits_of,
    decoded,
    installed,
    masks_of,
    prune,
    same_on_all_ranks,
    sent_while,
    support,
    take_sgd_step,
)
from tests_distributed.support.running import Run, selection
from tests_distributed.support.training import State

CONFIG: dict[str, Any] = {"weight_bits": 4, "grad_bits": 32, "ranks_per_node": 2}


def _gathers(reduce: str, is_masked: bool) -> tuple[list[dict[str, bytes]], list[dict[str, int]]]:
    """What gathers bring of weights that are moved by hand, and what they send."""
    model, handle = installed(1, {**CONFIG, "reduce": reduce, "delta_redraw_every": 3}, frozen=True)
    masks = masks_of(model, 0.5) if is_masked else {}
    if masks:
        prune(model, masks)
        handle.set_support(support(model, masks))
    found: list[dict[str, bytes]] = []
    counts = []
    for step in range(5):
        # A frame that is longer than expected comes with a rest.
        scale = 20.0 if step == 3 else 1.001
        with torch.no_grad():
            for p in model.parameters():
                local_shard(p).values.mul_(scale)
        weights: State = {}
        counts.append(sent_while(handle, lambda found=weights: found.update(decoded(model))))
        assert same_on_all_ranks(weights)
        found.append(bits_of(weights))
        take_sgd_step(model, step, 0.0)
    return found, counts


@selection("is_masked", [(False,)], (False, True))
def test_two_hops_bring_the_weights_of_one_for_fewer_bytes_between_nodes(
    run: Run, is_masked: bool
) -> None:
    flat, hops = (run(4, _gathers, reduce, is_masked) for reduce in ("flat", "two-hop"))
    for (found, _), (expected, _) in zip(hops, flat, strict=True):
        assert found == expected
    one, other = (
        {f"gather_{link}_bytes": 0 for link in LINKS} | {"changed_codes": 0, "redrawn_buckets": 0}
        for _ in range(2)
    )
    for totals, everyone in ((one, flat), (other, hops)):
        for _, counts in everyone:
            for step in counts:
                for name in totals:
                    totals[name] += step[name]
    assert other["changed_codes"] == one["changed_codes"] > 0
    assert other["redrawn_buckets"] == one["redrawn_buckets"] > 0
    # Around a ring two of four ranks pass three frames each to the other node; in two hops each
    # passes its own.
    assert 3 * other["gather_inter_node_bytes"] == 2 * one["gather_inter_node_bytes"] > 0
    assert 0 < other["gather_intra_node_bytes"]


def _trained() -> tuple[list[float], bool]:
    model, _ = installed(2, {**CONFIG, "grad_bits": 4, "reduce": "two-hop"}, tied=True)
    losses = []
    for step in range(4):
        losses.append(take_sgd_step(model, step, 0.1))
    return losses, same_on_all_ranks(decoded(model))


def test_all_ranks_of_all_nodes_train_with_the_same_weights(run: Run) -> None:
    for losses, same in run(4, _trained):
        assert same
        assert all(loss == loss for loss in losses)
