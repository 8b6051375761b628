"""Codes that the ranks of a node keep between them: the numbers of codes that every rank keeps.

Rows are half as many where nodes have two ranks, frames cross between nodes as before, and inside
the node each pass gathers rows.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.delta import (
    bits_of,
    decoded,
    installed,
    masks_of,
    other_weights,
    prune,
    same_on_all_ranks,
    sent_while,
    support,
    take_sgd_step,
)
from tests_distributed.support.going_on import Saved, Setting, Training
from tests_distributed.support.helpers import make_batch
from tests_distributed.support.running import Run, selection

RANKS = 4
NODES: dict[str, Any] = {"reduce": "two-hop", "ranks_per_node": 2}
AT, END = 2, 5
"""After how many steps a training is saved, and how many it takes."""

# --- numbers --------------------------------------------------------------------------------------

SETTINGS = {
    "all that is odd": Setting(
        share=0.4,
        options=dict.fromkeys(("frozen", "tied", "unused", "checkpointing"), True)
        | {"num_layers": 1},
    ),
    "plain": Setting(),
    "8 bits": Setting(config={"weight_bits": 8, "bucket_size": 64, "delta_room": 0.02}),
    "nearest": Setting(config={"rounding": "nearest", "weight_bits": 3, "embedding_bits": 4}),
    "re-computed": Setting(options={"checkpointing": True, "again": True}),
    "a budget": Setting(
        config={"budget": 5.0, "weight_bits": 8, "bucket_size": 64},
        options={"width": 32, "hidden": 32, "num_layers": 1},
    ),
    "after a warm-up": Setting(config={"warmup_steps": 1}),
    "bf16": Setting(options={"bf16": True}),
}


def _pass_beside(training: Training) -> list[Any]:
    """Losses of passes beside the training, of its own weights and of others."""
    model, handle = training.model, training.handle
    losses = []

    def look() -> None:
        with torch.no_grad():
            losses.append(float(model(*make_batch(model, 200))))

    look()
    with handle.exact():
        look()
    with handle.aside(), other_weights(model):
        look()
    return losses


def _numbers(name: str) -> tuple[list[str], int, int]:
    """What differs between the ways to keep codes; what each takes on this rank."""
    setting = SETTINGS[name]
    differing, kept = [], {}
    begun: dict[str, tuple[list[Any], Saved]] = {}
    ends: dict[str, list[Any]] = {}

    def made(codes: str, saved: Saved | None = None) -> Training:
        config = {**setting.config, **NODES, "delta_codes": codes}
        return Training(Setting(config=config, options=setting.options, share=setting.share), saved)

    for codes in ("rank", "node"):
        training = made(codes)
        found = training.take(range(AT))
        begun[codes], kept[codes] = (found, training.save()), training.handle.kept_bytes
        beside = _pass_beside(training)
        ends[codes] = [*beside, *training.take(range(AT, END))]
    if begun["node"][0] != begun["rank"][0]:
        differing.append("the beginning")
    if bits_of(begun["node"][1].grids) != bits_of(begun["rank"][1].grids):
        differing.append("saved grids")
    if ends["node"] != ends["rank"]:
        differing.append("the end")
    for codes, other in (("rank", "node"), ("node", "rank")):
        training = made(codes, begun[other][1])
        beside = _pass_beside(training)
        if [*beside, *training.take(range(AT, END))] != ends["rank"]:
            differing.append(f"{codes} after {other}")
    return differing, kept["rank"], kept["node"]


@selection("name", [("all that is odd",)], tuple(SETTINGS))
def test_numbers_are_those_of_codes_that_every_rank_keeps_also_where_one_goes_on_from_the_other(
    run: Run, name: str
) -> None:
    for differing, of_rank, of_node in run(RANKS, _numbers, name):
        assert differing == []
        assert 2 * of_node == of_rank > 0


# --- bytes ----------------------------------------------------------------------------------------

MEETING_BYTES = 48
"""What a rank tells the others of its node in each gather of a forward pass."""
INTRA, INTER = "gather_intra_node_bytes", "gather_inter_node_bytes"
COUNTS = ("changed_codes", "redrawn_buckets")
NUM_GROUPS = 3
STILL = 3
"""Steps without any change, at first."""


def _counted(codes: str, reshard: bool) -> dict[str, Any]:
    """What steps send and count; what this rank keeps of codes, and whether it is freed."""
    config = {**NODES, "weight_bits": 4, "grad_bits": 4, "bucket_size": 16, "delta_codes": codes}
    model, handle = installed(
        1, {**config, "delta_redraw_every": 1 << 30}, reshard=reshard, num_layers=1
    )

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            model(*make_batch(model, 100))
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else the next step would gather nothing
        model.train()

    acts: list[Callable[[], object]] = [
        partial(take_sgd_step, model, step, rate)
        for step, rate in enumerate((*[0.0] * STILL, 0.3, 10.0, 0.0))
    ]
    acts.insert(STILL, validate)
    sent = [sent_while(handle, act) for act in acts]
    rows = [each._rows for each in handle._wire.kept.values()]
    refs = [weakref.ref(row) for row in rows if row is not None]
    kept = handle.kept_bytes
    handle.remove()
    del rows, handle
    gc.collect()
    alive = sum(ref() is not None for ref in refs)
    return {"sent": sent, "kept": kept, "rows": len(refs), "alive": alive}


def _both_counted(reshard: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    return _counted("rank", reshard), _counted("node", reshard)


@selection("reshard", [(True,)], (True, False))
def test_frames_cross_between_nodes_as_before_and_rows_travel_inside_them(
    run: Run, reshard: bool
) -> None:
    everyone = run(RANKS, _both_counted, reshard)
    in_ranks, in_nodes = ([each[i]["sent"] for each in everyone] for i in range(2))
    for rank in range(RANKS):
        kept = everyone[rank][1]["kept"]
        assert 2 * kept == everyone[rank][0]["kept"]
        for step, (sent, before) in enumerate(zip(in_nodes[rank], in_ranks[rank], strict=True)):
            has_backward = step != STILL and reshard
            rows = kept * (1 + has_backward)
            assert sent[INTRA] == NUM_GROUPS * MEETING_BYTES + rows, step
            assert [sent[name] for name in COUNTS] == [before[name] for name in COUNTS], step
            # What is longer than expected comes behind, from those places of nodes that have it.
            if step <= STILL:
                assert sent[INTER] == before[INTER] > 0, step
            else:
                assert 0.9 * before[INTER] < sent[INTER] <= before[INTER], step
            for name in ("reduce_intra_node_bytes", "reduce_inter_node_bytes"):
                assert sent[name] == before[name]
        assert sum(sent["changed_codes"] for sent in in_nodes[rank]) > 0
        assert in_nodes[rank][-1]["redrawn_buckets"] > 0
        for each in everyone[rank]:
            assert each["rows"] == NUM_GROUPS
            assert each["alive"] == 0


# --- ranks ----------------------------------------------------------------------------------------


def _supports() -> list[bool]:
    """Whether all ranks decode the same while masks come, change and go; whether it is near."""
    model, handle = installed(3, {**NODES, "weight_bits": 8, "delta_codes": "node"})
    found = []
    for step, share in enumerate((None, 0.5, 0.3, None)):
        if share is not None:
            masks = masks_of(model, share, seed=step)
            prune(model, masks)
            handle.set_support(support(model, masks))
        else:
            handle.set_support(None)
        take_sgd_step(model, step, 0.0)
        weights = decoded(model)
        found.append(same_on_all_ranks(weights))
        for name, p in model.named_parameters():
            shard = local_shard(p)
            own = weights[name][
                tuple(
                    slice(o, o + n) for o, n in zip(shard.offset, shard.values.shape, strict=True)
                )
            ]
            found.append(bool(((own - shard.values).abs() < 0.05).all()))
    return found


def test_all_ranks_decode_the_same_weights_under_supports_that_change(run: Run) -> None:
    for found in run(RANKS, _supports):
        assert all(found)


def _reported() -> tuple[list[str], int]:
    model, handle = installed(1, {**NODES, "weight_bits": 4, "delta_codes": "node"})
    torch.autograd.backward(model(*make_batch(model, 0)))
    return [*handle.report().remarks], handle.kept_bytes


def test_the_report_says_what_a_rank_keeps(run: Run) -> None:
    for remarks, kept in run(RANKS, _reported):
        assert any(
            f"its share of a node's codes with their grids, {kept:,} bytes" in each
            for each in remarks
        )
