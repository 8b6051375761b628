"""One small training, over real processes and simulated in one, and that they are equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Shard

import qsdp
from qsdp.comm.traffic import LINKS
from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.helpers import (
    Toy,
    full_grads,
    full_state,
    make_batch,
    make_model,
    shard,
    wire_config,
)
from tests_distributed.support.running import Run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training, as both sides see it."""

    ranks: int = 2
    """Of the shard axis."""
    replicas: int = 1
    quantized_replicas: bool = False
    """A 1-D shard mesh and ``replicate_mesh``, not a native 2-D mesh."""
    reshard: bool | int | None = True
    nested: bool = True
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)
    """Parameter and reduce dtype of the mixed-precision policy."""
    micro_batches: int = 1
    sync_every: bool = False
    max_norm: float | None = None
    adamw: bool = False
    """Or SGD with momentum, in a few operations on all DTensors."""
    columns: bool = False
    """Shard the MLP's down-projection by columns: ``shard_placement_fn``, even sizes only."""
    sparse: bool = False
    """Matrices of the blocks are pruned, and the wire knows it."""
    steps: int | None = None
    """None: two, or three where the wire is another at a later step."""
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Of the model."""

    @property
    def counts_changes(self) -> bool:
        """Whether bytes of changes are compared, step by step."""
        is_plain = not self.sparse and not self.sync_every and "warmup_steps" not in self.config
        return self.config.get("gather") == "delta" and is_plain

    @property
    def num_steps(self) -> int:
        """How many steps are taken."""
        if self.steps is not None:
            return self.steps
        changing = {"levels", "budget", "warmup_steps"}
        return 2 + bool(changing & self.config.keys())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank saw."""

    losses: list[float]
    grads: list[dict[str, Tensor]]
    """Whole and before clipping, by step."""
    state: dict[str, Tensor]
    sent: list[tuple[int, ...]]
    """As ``counted``, by step: of cases that send changes whose bytes are to be compared."""


def assert_training_equals_its_simulation(run: Run, case: Case, seed: int) -> None:
    """Losses and gradients of every step, and the parameters at the end, bit for bit."""
    (expected,) = run(1, simulated, case, seed)
    results = run(case.ranks * case.replicas, trained, case, seed)
    for rank, (result, simulation) in enumerate(zip(results, expected, strict=True)):
        where = f"rank {rank}, seed {seed}"
        assert result.losses == simulation.losses, where
        for step in range(case.num_steps):
            assert_equal(result.grads[step], simulation.grads[step], f"step {step}, {where}")
        assert_equal(result.state, simulation.state, where)
        # What gets no gradient is not reduced, which the simulation's count does not look at.
        num = 2 if case.options.get("unused") else 4
        found, expected_bytes = ([b[:num] for b in each.sent] for each in (result, simulation))
        assert found == expected_bytes, where


def installed(case: Case, seed: int) -> tuple[Toy, qsdp.Handle]:
    """The sharded model with the wire on it."""
    model = _pruned(case, seed)
    param_dtype, reduce_dtype = case.dtypes
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if param_dtype == FP32 else param_dtype,
            reduce_dtype=None if reduce_dtype == param_dtype else reduce_dtype,
        )
    }
    replicate_mesh: dict[str, DeviceMesh] = {}
    if case.replicas > 1:
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (case.replicas, case.ranks), mesh_dim_names=names)
        if case.quantized_replicas:
            mesh, replicate_mesh = mesh["shard"], {"replicate_mesh": mesh["replicate"]}
        options["mesh"] = mesh
    if case.columns:
        by_columns = {id(block.mlp.down.weight) for block in model.blocks}
        options["shard_placement_fn"] = lambda p: Shard(1) if id(p) in by_columns else None
    shard(model, reshard=case.reshard, nested=case.nested, **options)
    handle = qsdp.install(model, _config(case, seed), **replicate_mesh)
    if case.sparse:
        parameters = dict(model.named_parameters())
        handle.set_support(
            {
                parameters[name]: own_part(mask, parameters[name])
                for name, mask in masks_of_blocks(seed, model)
            }
        )
    return model, handle


def _pruned(case: Case, seed: int) -> Toy:
    """The model before it is sharded."""
    model = make_model(seed, **case.options)
    if case.sparse:
        parameters = dict(model.named_parameters())
        for name, mask in masks_of_blocks(seed, model):
            parameters[name].data.masked_fill_(~mask, 0)
    return model


def masks_of_blocks(seed: int, model: Toy) -> list[tuple[str, Tensor]]:
    """By the names of the blocks' matrices: a fifth of each is kept, and nothing of one."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (name, torch.rand(p.shape, generator=generator) < 0.2 * ("1.mlp.up" not in name))
        for name, p in model.named_parameters()
        if "blocks" in name and p.ndim == 2
    ]


def own_part(mask: Tensor, parameter: Tensor) -> Tensor:
    """What is this rank's of the ``mask`` of a whole parameter."""
    shard = local_shard(parameter)
    for dim, (start, size) in enumerate(zip(shard.offset, shard.values.shape, strict=True)):
        mask = mask.narrow(dim, start, size)
    return mask


def trained(case: Case, seed: int) -> Outcome:
    """The real thing, on one rank of it."""
    model, handle = installed(case, seed)
    optimizer = make_optimizer(case, model.parameters())
    losses, grads, sent = [], [], []
    for step in range(case.num_steps):
        before = _sent_bytes(handle)
        for micro in range(case.micro_batches):
            is_last = micro == case.micro_batches - 1
            model.set_requires_gradient_sync(case.sync_every or is_last)
            loss = model(*make_batch(model, _batch_seed(seed, step, micro)))
            torch.autograd.backward(loss * (1 / case.micro_batches))
            losses.append(float(loss.detach()))
        if case.counts_changes:
            after = _sent_bytes(handle)
            sent.append(tuple(a - b for a, b in zip(after, before, strict=True)))
        grads.append(full_grads(model))
        if case.max_norm is not None:
            qsdp.clip_grad_norm_(model.parameters(), case.max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(losses=losses, grads=grads, state=full_state(model), sent=sent)


def counted(case: Case, seed: int) -> tuple[int, ...]:
    """Bytes that this rank sends in its second step.

    They are those of gathers and reduces, inside and outside its node.
    """
    model, handle = installed(case, seed)
    before: tuple[int, ...] = ()
    for step in range(2):
        before = _sent_bytes(handle)
        for micro in range(case.micro_batches):
            model.set_requires_gradient_sync(micro == case.micro_batches - 1)
            model(*make_batch(model, _batch_seed(seed, step, micro))).backward()
    return tuple(a - b for a, b in zip(_sent_bytes(handle), before, strict=True))


def _sent_bytes(handle: qsdp.Handle) -> tuple[int, ...]:
    counts = handle.traffic.snapshot()
    return tuple(counts[f"{d}_{link}_bytes"] for d in ("gather", "reduce") for link in LINKS)


def _simulated_bytes(simulation: qsdp.Simulation, case: Case, rank: int) -> tuple[int, ...]:
    found = simulation.wire_bytes(
        rank=rank, micro_batches=case.micro_batches, reshard_after_forward=case.reshard
    )
    directions = ("gather", "reduce")
    return tuple(getattr(found, f"{d}_{link}") for d in directions for link in LINKS)


def simulation_of(case: Case, seed: int) -> qsdp.Simulation:
    """The same by ``qsdp.simulate``."""
    model = _pruned(case, seed)
    groups = []
    for i in range(model.config.num_layers):
        groups += [f"blocks.{i}.mlp", f"blocks.{i}"] if case.nested else [f"blocks.{i}"]
    by_columns = [f"blocks.{i}.mlp.down.weight" for i in range(model.config.num_layers)]
    simulation = qsdp.simulate(
        model,
        _config(case, seed),
        world_size=case.ranks,
        optimizer=partial(make_optimizer, case),
        groups=groups,
        replicas=case.replicas,
        quantized_replicas=case.quantized_replicas,
        param_dtype=case.dtypes[0],
        reduce_dtype=case.dtypes[1],
        shard_dims=dict.fromkeys(by_columns, 1) if case.columns else None,
    )
    if case.sparse:
        simulation.set_support(dict(masks_of_blocks(seed, model)))
    return simulation


def simulated(case: Case, seed: int) -> list[Outcome]:
    """What every rank should see."""
    simulation, model = simulation_of(case, seed), make_model(seed, **case.options)
    num_ranks = case.ranks * case.replicas
    losses: list[list[float]] = [[] for _ in range(num_ranks)]
    sent: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    grads = []
    for step in range(case.num_steps):
        batches = [
            [make_batch(model, _batch_seed(seed, step, micro), rank) for rank in range(num_ranks)]
            for micro in range(case.micro_batches)
        ]
        for per_rank in simulation.pass_(batches, sync_every=case.sync_every):
            for rank, loss in enumerate(per_rank):
                losses[rank].append(loss)
        for rank in range(num_ranks if case.counts_changes else 0):
            sent[rank].append(_simulated_bytes(simulation, case, rank))
        grads.append(simulation.grads())
        if case.max_norm is not None:
            norm = simulation.clip(case.max_norm)
            assert norm > case.max_norm, "nothing is clipped: the case shows nothing"
        simulation.update()
    state = simulation.state()
    return [
        Outcome(losses=losses[rank], grads=grads, state=state, sent=sent[rank])
        for rank in range(num_ranks)
    ]


def _config(case: Case, seed: int) -> qsdp.QSDPConfig:
    return wire_config(64, **{"seed": seed, **case.config})


def make_optimizer(case: Case, parameters: Any) -> torch.optim.Optimizer:
    """That of the case."""
    if case.adamw:
        return torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.1, betas=(0.9, 0.95))
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=0.1, foreach=True)


def _batch_seed(seed: int, step: int, micro: int) -> int:
    return seed % 1000 * 100 + step * 10 + micro


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """The same tensors by the same names, bit for bit but for NaN and the sign of zeros."""
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name}, {where}"
