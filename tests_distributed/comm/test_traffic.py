"""The bytes that are counted are those of arithmetic."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

import qsdp
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.running import Run

CONFIG = {"bucket_size": 64}


def _payload(shapes: list[tuple[int, ...]], ranks: int, bits: int, bucket: int) -> tuple[int, int]:
    """Bytes of one payload, and values of all ranks together, from design.md alone."""
    coded, raw, values, meta = 0, 0, 0, 0
    for shape in shapes:
        numel = -(-shape[0] // ranks)
        for size in shape[1:]:
            numel *= size
        values += math.prod(shape)
        if len(shape) < 2 or bits == 32:
            raw += 4 * numel
        else:
            coded += -(-numel * bits // 8)
            meta += 8 * -(-numel // bucket)
    aligned = -(-(32 + meta + raw) // 16) * 16
    return -(-(aligned + coded) // 16) * 16, values


def _traffic(
    reshard: bool, ranks_per_node: int, reduce: str
) -> tuple[list[Any], list[dict[str, int]]]:
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    try:
        model = shard(make_model(unused=True, frozen=True), reshard=reshard)
        same = tuple((name, (5, 3)) for name in ("embed.*", "position.*", "head.*"))
        config = qsdp.QSDPConfig(**CONFIG, weight_bits=5, grad_bits=3, policy=same, reduce=reduce)
        handle = qsdp.install(model, config)
        snapshots = [handle.traffic.snapshot()]
        torch.autograd.backward(model(*make_batch(model, 1)))
        snapshots.append(handle.traffic.snapshot())
        with handle.traffic.paused(), handle.exact(), torch.no_grad():
            model(*make_batch(model, 2))
        snapshots.append(handle.traffic.snapshot())
        with handle.traffic.paused(), torch.no_grad():
            model(*make_batch(model, 2))
        snapshots.append(handle.traffic.snapshot())
    finally:
        if before is None:
            del os.environ["LOCAL_WORLD_SIZE"]
        else:
            os.environ["LOCAL_WORLD_SIZE"] = before
    rows = [
        (row.group, row.shape, "unused" not in row.name and row.grad != "none")
        for row in handle.report().rows
    ]
    return rows, snapshots


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "reshard", "reduce"),
    [(3, 1, True, "auto"), (4, 2, False, "flat"), (4, 2, False, "auto"), (4, 2, True, "two-hop")],
)
def test_the_counters_equal_arithmetic(
    run: Run, ranks: int, ranks_per_node: int, reshard: bool, reduce: str
) -> None:
    is_flat = reduce == "flat" or ranks_per_node == 1
    num_nodes = ranks // ranks_per_node
    everyone = run(ranks, _traffic, reshard, ranks_per_node, reduce)
    for rank, (rows, snapshots) in enumerate(everyone):
        groups = sorted({group for group, _, _ in rows})
        members = [[shape for g, shape, _ in rows if g == group] for group in groups]
        with_grad = [[shape for g, shape, grad in rows if g == group and grad] for group in groups]
        gathers = [_payload(shapes, ranks, 5, 64) for shapes in members]
        exact = [_payload(shapes, ranks, 32, 64) for shapes in members]
        reduces = [_payload(shapes, ranks, 3, 64) for shapes in with_grad if shapes]
        locally = [_payload(shapes, ranks, 8, 64) for shapes in with_grad if shapes]
        num_gathers = 2 if reshard else 1
        peers, intra = ranks - 1, ranks_per_node - 1
        gathered, exactly, reduced, added = (
            [sum(column) for column in zip(*sizes, strict=True)]
            for sizes in (gathers, exact, reduces, locally)
        )
        # A flat all-gather is a ring: all that a rank sends goes to the next one.
        crosses = (rank + 1) % ranks // ranks_per_node != rank // ranks_per_node
        gathers_inside = (0 if crosses else peers) if is_flat else intra * num_nodes
        inside, between = intra * reduced[0], (peers - intra) * reduced[0]
        if not is_flat:
            inside, between = intra * num_nodes * added[0], (num_nodes - 1) * reduced[0]
        assert set(snapshots[0].values()) == {0}
        train = snapshots[1]
        assert train["gather_sent_bytes"] == num_gathers * peers * gathered[0]
        assert train["gather_intra_node_bytes"] == num_gathers * gathers_inside * gathered[0]
        assert train["reduce_intra_node_bytes"] == inside
        assert train["reduce_inter_node_bytes"] == between
        in_fp32 = num_gathers * sum(peers * 4 * values // ranks for _, values in gathers)
        assert train["gather_fp32_bytes"] == in_fp32
        assert train["reduce_fp32_bytes"] == sum(peers * 4 * n // ranks for _, n in reduces)
        assert train["other_sent_bytes"] == 0
        for snapshot in snapshots[2:]:
            for key in train:
                if not key.startswith("other"):
                    assert snapshot[key] == train[key], key
        assert snapshots[2]["other_sent_bytes"] == peers * exactly[0]
        assert snapshots[3]["other_sent_bytes"] == peers * (exactly[0] + gathered[0])
