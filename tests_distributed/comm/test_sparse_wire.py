"""The sparse wire: what it saves, what it refuses, and that the optimizers use it.

Its numbers are compared with the simulation in test_combinations.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import qsdp
from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.helpers import full_state, make_batch, make_model, shard, wire_config
from tests_distributed.support.running import Run, selection
from tests_distributed.support.trainings import Case, counted

SCHEDULE = qsdp.ACDCSchedule(steps=9, warmup=2, phase=2, last_dense=2, last_sparse=2)


def _counts(sparse: bool, bits: int, gather: str) -> tuple[int, ...]:
    config = {"weight_bits": bits, "grad_bits": bits, "gather": gather}
    options = {"width": 64, "hidden": 64}
    return counted(Case(ranks=2, sparse=sparse, config=config, options=options), 3)


@pytest.mark.parametrize(("bits", "gather"), [(8, "twice"), (4, "once"), (32, "twice")])
def test_a_pruned_weight_costs_nothing(run: Run, bits: int, gather: str) -> None:
    for whole, kept in zip(
        run(2, _counts, False, bits, gather), run(2, _counts, True, bits, gather), strict=True
    ):
        # Embeddings and the head, an eighth of the bytes, travel whole; a fifth of the rest does.
        assert sum(kept) < 0.5 * sum(whole)


def _trained(method: str, is_told: bool, bits: int, hops: str, num_steps: int) -> Any:
    model = shard(make_model(tied=True))
    config = wire_config(16, weight_bits=bits, grad_bits=bits, reduce=hops, ranks_per_node=2)
    handle = qsdp.install(model, config)
    base = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    optimizer: Any
    if method == "acdc":
        optimizer = qsdp.ACDC(model, base, schedule=SCHEDULE, target=0.8)
    elif method == "gmp":
        schedule = qsdp.GMPSchedule.of(9, 0.8, start=2, every=2)
        optimizer = qsdp.GMP(model, base, schedule=schedule)
    else:
        targets = ("0.8", "2:5", "0.5+block5", "4bit")
        optimizer = qsdp.CrAM(model, base, sparsity=targets, sparse_grad=method == "cram")
    if is_told:
        optimizer.share_support(handle.set_support)
    losses, sent = [], [0]
    for step in range(num_steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(*make_batch(model, step))
            loss.backward()
            return loss.detach()

        losses.append(float(optimizer.step(closure)))
        counts = handle.traffic.snapshot()
        sent.append(counts["gather_sent_bytes"] + counts["reduce_sent_bytes"])
    return losses, full_state(model), [b - a for a, b in pairwise(sent)]


@selection(
    "ranks, method",
    [(2, "cram"), (2, "gmp"), (3, "cram-dense-grad"), (4, "acdc")],
    [2, 3, 4],
    ["acdc", "gmp", "cram", "cram-dense-grad"],
)
def test_telling_the_wire_changes_no_number_in_full_precision(
    run: Run, ranks: int, method: str
) -> None:
    hops = "two-hop" if ranks == 4 else "flat"
    # CrAM takes a target a step; the others prune at the third one, and AC/DC is dense again at
    # the fifth, GMP prunes more.
    num_steps = 4 if "cram" in method else 5
    told = run(ranks, _trained, method, True, 32, hops, num_steps)
    untold = run(ranks, _trained, method, False, 32, hops, num_steps)
    for (losses, state, sent), (expected, expected_state, all_sent) in zip(
        told, untold, strict=True
    ):
        assert losses == expected
        for name, value in expected_state.items():
            assert torch.equal(state[name], value), name
        assert sum(sent) < sum(all_sent)


def test_compressed_phases_send_less_and_dense_ones_as_much_as_before(run: Run) -> None:
    for _, _, sent in run(2, _trained, "acdc", True, 8, "flat", 9):
        compressed = [
            s for s, step in zip(sent, range(9), strict=True) if SCHEDULE.is_compressed(step)
        ]
        dense = [
            s for s, step in zip(sent, range(9), strict=True) if not SCHEDULE.is_compressed(step)
        ]
        assert max(compressed) < min(dense)


def _misused(what: str) -> str:
    model = shard(make_model())
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=16))
    weight = cast(nn.Parameter, model.blocks[0].get_parameter("qkv.weight"))
    local = local_shard(weight).values
    stranger = nn.Parameter(torch.ones(3))
    masks: dict[str, dict[nn.Parameter, Tensor]] = {
        "stray": {weight: torch.zeros_like(local, dtype=torch.bool)},
        "stranger": {stranger: torch.ones(3, dtype=torch.bool)},
        "floats": {weight: torch.ones_like(local)},
        "a DTensor": {weight: torch.ones_like(weight, dtype=torch.bool)},
        "too long": {weight: torch.ones(local.numel() + 8, dtype=torch.bool)},
    }
    try:
        handle.set_support(masks[what])
        model(*make_batch(model, 0))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("stray", "a weight outside the mask is not zero"),
        ("stranger", "does not shard"),
        ("floats", "give a bool tensor"),
        ("a DTensor", "a DTensor's mask.to_local()"),
        ("too long", "a mask has shape"),
    ],
)
def test_a_wrong_support_is_refused(run: Run, what: str, message: str) -> None:
    for said in run(2, _misused, what):
        assert message in said


def _lifted() -> Any:
    results = []
    for is_pruned_before in (False, True):
        model = shard(make_model())
        handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=16))
        if is_pruned_before:
            weight = cast(nn.Parameter, model.blocks[0].get_parameter("qkv.weight"))
            keep = torch.ones_like(local_shard(weight).values, dtype=torch.bool)
            handle.set_support({weight: keep})
            handle.set_support(None)
        loss = model(*make_batch(model, 0))
        cast(FSDPModule, model).reshard()
        results.append((float(loss), handle.traffic.snapshot()["gather_sent_bytes"]))
    return results


def test_a_lifted_support_leaves_no_trace_but_its_masks(run: Run) -> None:
    for (loss, sent), (lifted_loss, lifted_sent) in run(2, _lifted):
        assert lifted_loss == loss
        assert lifted_sent - sent == -(-15 * 10 // 8)


def _bytes_of_masks() -> tuple[int, int, int]:
    """Of all layouts together, of the weights of all ranks' shards at a bit each, and layouts."""
    model = shard(make_model(width=64, hidden=64))
    handle = qsdp.install(model, qsdp.QSDPConfig(gather="once"))
    masks, num_bytes = {}, 0
    for p in model.parameters():
        values = local_shard(p).values
        masks[p] = values > 0
        values.masked_fill_(~masks[p], 0)
        num_bytes += 2 * -(-values.numel() // 8)
    handle.set_support(masks)  # type: ignore[arg-type]
    for step in range(2):
        model(*make_batch(model, step)).backward()
    layouts = [x for plan in handle._plans for x in plan._layouts.values()]
    pruned = [layout.pruned for layout in layouts if layout.pruned is not None]
    storages = [each._bits.untyped_storage() for each in pruned]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(held.values()), num_bytes, len(pruned)


def test_masks_of_all_ranks_take_one_bit_a_weight(run: Run) -> None:
    for held, num_bytes, num_layouts in run(2, _bytes_of_masks):
        assert num_layouts > 5
        assert num_bytes <= held < 1.01 * num_bytes
