"""A training whose every number is the same on CPUs and GPUs: only the wire rounds.

The loss is a sum of products of weights and constants, so that gradients are those constants;
weights move by a power of two of their gradients, in one rounding however it is computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import qsdp
from qsdp import ops
from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.helpers import all_ranks, wire_config

_RATE = 2.0**-5
_NUM_BLOCKS = 4
_DELAY_CYCLES = 2_000_000  # a millisecond or two


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training."""

    ranks: int = 2
    num_steps: int = 4
    reshard: bool | int = True
    replicas: int = 1
    """With qsdp's own all-reduce between them."""
    is_bf16: bool = False
    """Weights are gathered in bf16."""
    reduce_dtype: torch.dtype | None = None
    """Of gradients, if not fp32."""
    micro_batches: int = 1
    prefetch: bool = False
    early: bool = False
    """The last block is asked for in the forward of the one before, on the stream of the model."""
    sparse: bool = False
    """From the second step on a third of the matrices' weights is kept, and the wire knows it."""
    rows: int = 37
    config: dict[str, Any] = field(default_factory=dict)


class Part(nn.Module):
    """Parameters of shapes that are hard to shard, times the constants that it is given."""

    def __init__(self, generator: torch.Generator, rows: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in _shapes(rows)
        )
        self.seen: list[Tensor] = []

    def forward(self, total: Tensor, constants: list[Tensor]) -> Tensor:
        self.see()
        for weight, constant in zip(self.weights, constants, strict=True):
            term = (weight * constant).sum()
            total = total + term
        if term.requires_grad:
            # Not of the total: FSDP2 gathers when the total's own gradient is there.
            term.register_hook(lambda _: self.see())
        return total

    def see(self) -> None:
        """Keep what is computed with, in the order of the stream."""
        self.seen += [weight.detach().clone() for weight in self.weights]


class Sums(nn.Module):
    """Blocks, and a part of the root's own."""

    def __init__(self, seed: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(Part(generator, rows) for _ in range(_NUM_BLOCKS))
        self.last = Part(generator, rows)

    @property
    def parts(self) -> list[Part]:
        return [*self.blocks, self.last]  # type: ignore[list-item]

    def forward(self, constants: list[list[Tensor]]) -> Tensor:
        total = constants[0][0].new_zeros(())
        for part, own in zip(self.parts, constants, strict=True):
            total = part(total, own)
        return total


def _shapes(rows: int) -> list[tuple[int, ...]]:
    return [(rows, 24), (5, rows), (3, 2, 8), (10,), (1,)]


def trained(case: Case, device: str, delays: int | None = None) -> list[Tensor]:
    """Every weight that this rank computed with, its gradients, and its last shards, on the CPU.

    ``delays``: a seed of waits on the streams, which must change nothing.
    """
    model, handle = make(case, device)
    grads: list[Tensor] = []
    for step in range(case.num_steps):
        if case.sparse and step == 1:
            keep_a_third(model, handle)
        take_step(model, case, step, device, grads, delays)
    shards = [local_shard(p).values for p in model.parameters()]
    seen = [value for part in model.parts for value in part.seen]
    return [value.cpu() for value in (*seen, *grads, *shards)]


def make(case: Case, device: str) -> tuple[Sums, qsdp.Handle]:
    """The sharded model with the wire on it."""
    model = Sums(3, case.rows).to(device)
    mesh, replicate_mesh = all_ranks(device), None
    if case.replicas > 1:
        shape = (case.replicas, case.ranks // case.replicas)
        whole = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
        mesh, replicate_mesh = whole["shard"], whole["replicate"]
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if case.is_bf16 else None,
        reduce_dtype=case.reduce_dtype or (torch.float32 if case.is_bf16 else None),
    )
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=case.reshard, mp_policy=policy)
    if case.prefetch:
        for block, following in pairwise(blocks_of(model)):
            block.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([block])
    if case.early:
        *_, before, last = blocks_of(model)

        def ask(*_: object) -> None:
            last.unshard(async_op=True)

        before.register_forward_pre_hook(ask)
    config = wire_config(64, **case.config)
    handle = qsdp.install(model, config, replicate_mesh=replicate_mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A GPU divides by a number of ranks that is no power of two in another way.
            module.set_gradient_divide_factor(1.0)
    return model, handle


def blocks_of(model: Sums) -> list[Any]:
    """In the order of the forward pass."""
    return list(model.blocks)


def take_step(
    model: Sums, case: Case, step: int, device: str, grads: list[Tensor], delays: int | None = None
) -> None:
    """Forward and backward over the micro-batches, and an exact update."""
    batches = [constants(model, 10 * step + micro, device) for micro in range(case.micro_batches)]
    with nullcontext() if delays is None else delayed(delays, step):
        for micro, batch in enumerate(batches):
            is_last = micro == case.micro_batches - 1
            model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
            model(batch).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            grad = local_shard(parameter.grad).values
            grads.append(grad.clone())
            values = local_shard(parameter).values
            is_pruned = (values == 0) & (case.sparse and step > 0)
            values.add_(grad.masked_fill(is_pruned, 0), alpha=-_RATE).masked_fill_(is_pruned, 0)
            parameter.grad = None


def constants(model: Sums, seed: int, device: str) -> list[list[Tensor]]:
    """What a rank multiplies its weights with."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    return [
        [torch.randn(shape, generator=generator).to(device) for shape in _shapes(model.rows)]
        for _ in model.parts
    ]


def keep_a_third(model: Sums, handle: qsdp.Handle) -> None:
    """Prune the matrices, and tell the wire."""
    masks = {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                values = local_shard(parameter).values
                masks[parameter] = values.abs() > 1
                values.masked_fill_(~masks[parameter], 0)
    handle.set_support(masks)  # type: ignore[arg-type]


def trained_in_order(case: Case, device: str) -> list[Tensor]:
    """``trained`` without streams beside each other: the host waits around the codec's calls."""

    def in_order(work: Any) -> Any:
        def call(*args: Any, **options: Any) -> None:
            torch.cuda.synchronize()
            work(*args, **options)
            torch.cuda.synchronize()

        return call

    with _codec_calls(in_order):
        return trained(case, device)


@contextmanager
def delayed(seed: int, step: int) -> Iterator[None]:
    """Inside, the GPU sleeps now and then, on the stream of the codec and on the model's.

    It does before and after the work of each.
    """
    draw = random.Random(f"{seed} {step} {dist.get_rank()}")

    def late(work: Any) -> Any:
        def call(*args: Any, **options: Any) -> None:
            _sleep(draw)
            work(*args, **options)
            _sleep(draw)

        return call

    with _codec_calls(late), mock.patch.object(Part, "see", late(Part.see)):
        yield


CODEC = ("encode", "decode", "encode_all", "decode_all", "encode_changes", "apply_changes")


@contextmanager
def _codec_calls(changed: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the codec's operators are what ``changed`` makes of them."""
    with ExitStack() as patches:
        for name in CODEC:
            patches.enter_context(mock.patch.object(ops, name, changed(getattr(ops, name))))
        yield


def _sleep(draw: random.Random) -> None:
    if draw.random() < 0.4:
        torch.cuda._sleep(draw.randrange(_DELAY_CYCLES))


CASES = {
    "8 bits": Case(),
    "3 ranks, prefetched": Case(ranks=3, prefetch=True, config={"weight_bits": 3}),
    "kept": Case(ranks=3, config={"gather": "once", "weight_bits": 4, "grad_bits": 4}),
    "gathered again by two": Case(ranks=4, reshard=2),
    "two hops": Case(ranks=4, config={"ranks_per_node": 2, "reduce": "two-hop"}),
    "replicas": Case(ranks=4, replicas=2, config={"grad_bits": 4}),
    "bf16": Case(is_bf16=True, micro_batches=2),
    "sparse": Case(ranks=3, sparse=True),
}
MORE_CASES = {
    "3 ranks, 4 bits": Case(ranks=3, config={"weight_bits": 4, "grad_bits": 4}),
    "gathered once": Case(reshard=False, config={"rounding": "stochastic", "weight_bits": 5}),
    "learned levels": Case(
        config={"weight_bits": 4, "grad_bits": 3, "levels": "learned", "level_steps": (1, 3)}
    ),
    "micro-batches": Case(micro_batches=3, config={"grad_bits": 2}),
    "raw": Case(config={"weight_bits": 32, "grad_bits": 16}),
    "sparse, kept": Case(sparse=True, config={"gather": "once", "weight_bits": 4}),
    "changes": Case(ranks=3, micro_batches=2, config={"gather": "delta", "weight_bits": 4}),
    "changes, bf16": Case(is_bf16=True, prefetch=True, config={"gather": "delta"}),
}


RACES = {
    "resharded": Case(rows=4096),
    "prefetched": Case(rows=4096, prefetch=True, micro_batches=2, config={"weight_bits": 4}),
    "kept": Case(rows=4096, config={"gather": "once", "grad_bits": 4}),
    "kept, asked for early": Case(rows=4096, early=True, config={"gather": "once"}),
    "changes": Case(rows=4096, prefetch=True, config={"gather": "delta", "weight_bits": 4}),
    "changes, asked for early": Case(
        rows=4096, early=True, micro_batches=2, config={"gather": "delta", "delta_redraw_every": 2}
    ),
    "replicas, bf16": Case(ranks=4, replicas=2, rows=4096, is_bf16=True),
    # FSDP2 casts what was averaged, and drops it: the next group's reduce is given its memory.
    "replicas, reduced in bf16": Case(
        ranks=4, replicas=2, rows=4096, reduce_dtype=torch.bfloat16, micro_batches=2
    ),
}


def assert_equal(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    """Of every rank, bit for bit."""
    for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(one, other), f"tensor {i} of {len(ours)} on rank {rank}"
