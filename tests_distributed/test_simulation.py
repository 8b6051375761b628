"""QSDP training over processes equals a simulation of it in one process, bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Shard

import qsdp
from qsdp.optim.base import clip_grad_norm_
from tests_distributed.conftest import Run
from tests_distributed.helpers import full_state, make_batch, make_model, shard
from tests_distributed.simulation import Simulation, World, groups_by_prefix

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training, as both sides see it."""

    ranks: int = 2
    """Of the shard axis."""
    replicas: int = 1
    reshard: bool | int = True
    nested: bool = True
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    """Parameter and reduce dtype of the mixed-precision policy."""
    micro_batches: int = 1
    sync_every: bool = False
    max_norm: float | None = None
    columns: bool = False
    """Shard the MLP's down-projection by columns: `shard_placement_fn`, even sizes only."""
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "plain": Case(),
    "gathered-once": Case(ranks=3, reshard=False, config={"rounding": "dither"}),
    "clipped": Case(max_norm=0.1, config={"grad_bits": 4}),
    "clipped-uneven": Case(ranks=4, max_norm=0.1, config={"rounding": "stochastic"}),
    "clipped-bf16": Case(ranks=3, max_norm=0.1, dtypes=(BF16, FP32), options={"frozen": True}),
    "bf16": Case(ranks=3, dtypes=(BF16, BF16), config={"grad_bits": 4}),
    "bf16-accumulated-in-fp32": Case(
        dtypes=(BF16, FP32), micro_batches=3, reshard=False, config={"rounding": "dither"}
    ),
    "bf16-accumulated-in-bf16": Case(dtypes=(BF16, BF16), micro_batches=2),
    "fp16-reduce": Case(ranks=4, dtypes=(FP32, FP16), config={"rounding": "nearest"}),
    "tied": Case(ranks=3, options={"tied": True}, config={"weight_bits": 4, "grad_bits": 3}),
    "tied-one-group": Case(options={"tied": True}, nested=False, reshard=False),
    "frozen": Case(ranks=4, options={"frozen": True}, config={"weight_bits": 3}),
    "unused": Case(ranks=3, options={"unused": True}, config={"rounding": "dither"}),
    "everything-odd": Case(
        ranks=3,
        reshard=False,
        micro_batches=2,
        max_norm=0.1,
        options={"tied": True, "frozen": True, "unused": True, "checkpointing": True},
        config={"rounding": "stochastic", "weight_bits": 5, "grad_bits": 6, "bucket_size": 16},
    ),
    "accumulated": Case(ranks=4, micro_batches=3, config={"rounding": "stochastic"}),
    "accumulated-after-reduce": Case(micro_batches=3, sync_every=True, max_norm=0.1),
    "accumulated-after-reduce-gathered-once": Case(
        ranks=3, micro_batches=2, sync_every=True, reshard=False, config={"rounding": "dither"}
    ),
    "recomputed": Case(options={"checkpointing": True}, config={"weight_bits": 4}),
    "recomputed-gathered-once-bf16": Case(
        ranks=4, options={"checkpointing": True}, reshard=False, dtypes=(BF16, FP32)
    ),
    "small-buckets": Case(ranks=3, config={"bucket_size": 8, "weight_bits": 3, "grad_bits": 3}),
    "policy": Case(
        ranks=4,
        config={
            "policy": (("*.mlp.up.weight", 4), ("embed.*", 16), ("head.*", 32), ("*norm1*", 5)),
            "rounding": "dither",
        },
    ),
    "policy-bf16": Case(config={"policy": (("*.qkv.*", 2), ("*", 16))}, dtypes=(BF16, FP32)),
    "bf16-on-the-wire": Case(ranks=3, config={"weight_bits": 16, "grad_bits": 16}),
    "nearest": Case(ranks=4, config={"rounding": "nearest", "weight_bits": 4, "grad_bits": 4}),
    "other-seed": Case(config={"seed": 2**62 + 12345}),
    "replicated": Case(ranks=2, replicas=2, max_norm=0.1, config={"grad_bits": 4}),
    "regathered-by-two": Case(ranks=4, reshard=2, config={"weight_bits": 4}),
    "by-columns": Case(ranks=2, columns=True, nested=False, options={"hidden": 6}),
}


def _config(case: Case, seed: int) -> qsdp.QSDPConfig:
    return qsdp.QSDPConfig(**{"bucket_size": 64, "seed": seed, **case.config})


def _optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.1, betas=(0.9, 0.95))


def _batch_seed(seed: int, step: int, micro: int) -> int:
    return seed % 1000 * 100 + step * 10 + micro


def _train(case: Case, seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What one rank of the real thing sees: its losses, and the whole parameters at the end."""
    model = make_model(seed, **case.options)
    param_dtype, reduce_dtype = case.dtypes
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if param_dtype == torch.float32 else param_dtype,
            reduce_dtype=None if reduce_dtype == param_dtype else reduce_dtype,
        )
    }
    if case.replicas > 1:
        options["mesh"] = init_device_mesh(
            "cpu", (case.replicas, case.ranks), mesh_dim_names=("replicate", "shard")
        )
    if case.columns:
        by_columns = {id(block.mlp.down.weight) for block in model.blocks}
        options["shard_placement_fn"] = lambda p: Shard(1) if id(p) in by_columns else None
    shard(model, reshard=case.reshard, nested=case.nested, **options)
    qsdp.install(model, _config(case, seed))
    optimizer = _optimizer(model.parameters())
    losses = []
    for step in range(STEPS):
        for micro in range(case.micro_batches):
            is_last = micro == case.micro_batches - 1
            model.set_requires_gradient_sync(case.sync_every or is_last)
            loss = model(*make_batch(model, _batch_seed(seed, step, micro)))
            torch.autograd.backward(loss * (1 / case.micro_batches))
            losses.append(float(loss.detach()))
        if case.max_norm is not None:
            clip_grad_norm_(model.parameters(), case.max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses, full_state(model)


def _simulate(case: Case, seed: int) -> tuple[list[list[float]], dict[str, torch.Tensor], float]:
    """Losses by rank, the whole parameters, and how much was clipped at the least."""
    # Recomputation must change nothing: the simulation does without.
    model = make_model(seed, **{**case.options, "checkpointing": False})
    prefixes = [""]
    for i in range(model.config.num_layers):
        prefixes += [f"blocks.{i}", f"blocks.{i}.mlp"] if case.nested else [f"blocks.{i}"]
    world = World(
        world_size=case.ranks,
        replicas=case.replicas,
        groups=groups_by_prefix(model, prefixes),
        param_dtype=case.dtypes[0],
        reduce_dtype=case.dtypes[1],
        shard_dims=lambda name: int(case.columns and name.endswith("mlp.down.weight")),
    )
    simulation = Simulation(model, _config(case, seed), world, _optimizer)
    num_ranks = case.ranks * case.replicas
    losses: list[list[float]] = [[] for _ in range(num_ranks)]
    least_norm = float("inf")
    for step in range(STEPS):
        batches = [
            [make_batch(model, _batch_seed(seed, step, micro), rank) for rank in range(num_ranks)]
            for micro in range(case.micro_batches)
        ]
        per_micro = simulation.pass_(
            batches, sync_every=case.sync_every, scale=1 / case.micro_batches
        )
        for per_rank in per_micro:
            for rank, loss in enumerate(per_rank):
                losses[rank].append(loss)
        if case.max_norm is not None:
            least_norm = min(least_norm, simulation.clip(case.max_norm))
        simulation.update()
    return losses, simulation.state(), least_norm


@pytest.mark.parametrize("name", CASES)
def test_training_equals_the_simulation_bit_for_bit(run: Run, name: str) -> None:
    case, seed = CASES[name], random.randrange(1 << 30)
    expected_losses, expected, least_norm = run(1, _simulate, case, seed)[0]
    if case.max_norm is not None:
        assert least_norm > case.max_norm, "nothing is clipped: the case shows nothing"
    for rank, (losses, state) in enumerate(run(case.ranks * case.replicas, _train, case, seed)):
        assert losses == expected_losses[rank], f"rank {rank}, seed {seed}"
        assert state.keys() == expected.keys()
        for parameter, value in expected.items():
            assert torch.equal(state[parameter], value), f"{parameter}, rank {rank}, seed {seed}"
