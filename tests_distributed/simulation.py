"""QSDP training of N ranks in one process, from the paper and the design, without FSDP2.

It knows plain tensors, functional calls of the model, the codec, and the documented facts:

- Weights (arXiv 2302.02390, section 4): every rank's shard of every parameter is quantized under
  the key (seed, step, gather, hop 0, occurrence 0, rank in the shard group); all ranks compute with
  the decoded shards, the sender too. Forward and backward of a step see the same weights.
- Gradients: each rank quantizes the rows of every other rank under the key (seed, step, reduce,
  hop 0, occurrence, sender's global rank, receiver's rank in the shard group); a rank's own row is
  exact. Rows are added in fp32 in rank order, stored in the reduce dtype, then divided.
- Parameters of fewer than two dimensions travel raw. Parameters and groups are numbered in the
  order of `named_parameters()` and of `modules()`.
- The step advances with every synchronised backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qsdp.codec.payload import DType, Layout, Segment
from qsdp.codec.rounding import Key
from qsdp.comm.plan import embedding_names
from qsdp.config import ROUNDINGS, QSDPConfig

GATHER, REDUCE = 0, 1
CODEC_DTYPES = {
    torch.float32: DType.FP32,
    torch.bfloat16: DType.BF16,
    torch.float16: DType.FP16,
}


@dataclass(frozen=True, kw_only=True)
class World:
    """How the simulated ranks share the model."""

    world_size: int
    """Ranks of the shard axis."""
    groups: Mapping[str, int]
    """The number of each parameter's group."""
    replicas: int = 1
    """Ranks of the replicate axis (HSDP): rank = replica * world_size + shard rank."""
    param_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    shard_dims: Callable[[str], int] = lambda name: 0


class Simulation:
    """The ranks' shards and optimizers, and what crosses the wire between them.

    Args:
        model: A plain model; its weights are where training starts. Not changed.
        config: What the wire does.
        world: Sizes, dtypes and numbering.
        make_optimizer: Called once a shard rank with that rank's shards.
    """

    def __init__(
        self,
        model: nn.Module,
        config: QSDPConfig,
        world: World,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.config, self.world, self.step = config, world, 0
        self._model = model
        self._reduced = False
        self._embeddings = embedding_names(model)
        named = dict(model.named_parameters())
        self.numbers = {name: i for i, name in enumerate(named)}
        self.shards = [
            {
                name: nn.Parameter(rows[rank].clone(), requires_grad=named[name].requires_grad)
                for name, rows in ((n, self._cut(n, p.detach())) for n, p in named.items())
            }
            for rank in range(world.world_size)
        ]
        self.optimizers = [make_optimizer(list(shards.values())) for shards in self.shards]

    def state(self) -> dict[str, Tensor]:
        """Every whole parameter, exact."""
        return {
            name: self._join(name, [shards[name].detach() for shards in self.shards])
            for name in self.numbers
        }

    def weights(self) -> dict[str, Tensor]:
        """What every rank computes with in this step, in the parameter dtype."""
        gathered = {}
        for name in self.numbers:
            rows = []
            for rank, shards in enumerate(self.shards):
                key = Key(self.config.seed, self.step, GATHER, 0, 0, rank)
                row = shards[name].detach().to(self.world.param_dtype)
                rows.append(self._cross(name, row, key))
            gathered[name] = self._join(name, rows)
        return gathered

    def pass_(
        self, batches: Sequence[Sequence[Any]], *, sync_every: bool, scale: float
    ) -> list[list[float]]:
        """Forward and backward of ``batches[micro][rank]``; the shards' `.grad` get the result.

        Args:
            batches: Positional arguments of the model, by micro-batch and global rank.
            sync_every: Reduce after each micro-batch, not only after the last.
            scale: Factor of each loss.

        Returns:
            The unscaled losses, by micro-batch and rank.
        """
        losses: list[list[float]] = []
        kept: list[dict[str, Tensor]] = [{} for _ in batches[0]]
        for micro, per_rank in enumerate(batches):
            if self._reduced:
                self.step, self._reduced = self.step + 1, False
            losses.append([])
            weights = self.weights()
            for rank, batch in enumerate(per_rank):
                loss, grads = self._loss_and_grads(weights, batch, scale)
                losses[-1].append(loss)
                for name, grad in grads.items():
                    kept[rank][name] = self._accumulate(kept[rank].get(name), grad)
            if sync_every or micro == len(batches) - 1:
                self._reduce(kept)
                kept = [{} for _ in per_rank]
        return losses

    def clip(self, max_norm: float) -> float:
        """Clip by the norm of per-rank fp64 sums added in rank order; returns the norm."""
        sums = [
            sum(float(p.grad.double().square().sum()) for p in grads_of(shards))
            for shards in self.shards
        ]
        norm = math.sqrt(sum(sums))
        coefficient = min(1.0, max_norm / (norm + 1e-6))
        for shards in self.shards:
            for parameter in grads_of(shards):
                assert parameter.grad is not None
                parameter.grad.mul_(coefficient)
        return norm

    def update(self) -> None:
        """Every rank's optimizer step."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def _loss_and_grads(
        self, weights: Mapping[str, Tensor], batch: Any, scale: float
    ) -> tuple[float, dict[str, Tensor]]:
        leaves = {
            name: value.clone().requires_grad_(self.shards[0][name].requires_grad)
            for name, value in weights.items()
        }
        loss = functional_call(self._model, leaves, tuple(batch))
        torch.autograd.backward(loss * scale)
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return float(loss.detach()), grads

    def _accumulate(self, kept: Tensor | None, grad: Tensor) -> Tensor:
        grad = grad.to(self.world.reduce_dtype)
        return grad.clone() if kept is None else kept + grad

    def _reduce(self, grads: list[dict[str, Tensor]]) -> None:
        """``grads[rank]`` by name; every rank has a gradient for the same parameters."""
        world, dtype = self.world, self.world.reduce_dtype
        size = world.world_size
        divisor = float(size * world.replicas)
        before = _fp16_predivisor(divisor) if dtype == torch.float16 else 1.0
        for name in grads[0]:
            rows = [self._cut(name, grad[name].div(before)) for grad in grads]
            for receiver in range(size):
                replicas = []
                for first in range(0, size * world.replicas, size):
                    total = torch.zeros_like(rows[0][receiver], dtype=torch.float32)
                    for sender in range(size):
                        row = rows[first + sender][receiver]
                        if sender != receiver:
                            key = self._reduce_key(first + sender, receiver)
                            row = self._cross(name, row, key, is_grad=True)
                        total = total + row if sender else row.float()
                    replicas.append(total.to(dtype))
                reduced = sum(replicas[1:], replicas[0])
                reduced = reduced.div(divisor / before).to(torch.float32)
                shard = self.shards[receiver][name]
                shard.grad = reduced if shard.grad is None else shard.grad + reduced
        self._reduced = True

    def _reduce_key(self, sender: int, receiver: int) -> Key:
        return Key(self.config.seed, self.step, REDUCE, 0, 0, sender, receiver)

    def _cross(self, name: str, values: Tensor, key: Key, is_grad: bool = False) -> Tensor:
        """What the receiver decodes of ``values``, any shape: weights in their dtype, gradients in
        fp32."""
        bits = self.config.bits_of(name, name in self._embeddings)[is_grad]
        is_by_policy = any(fnmatchcase(name, pattern) for pattern, _ in self.config.policy)
        if self._model.get_parameter(name).dim() < 2 and not is_by_policy:
            bits = 32
        own = CODEC_DTYPES[values.dtype]
        segment = Segment(
            bits=bits if bits <= 8 else 0,
            dtype=own,
            wire=DType.BF16 if bits == 16 and own == DType.FP32 else own,
            padded=values.numel(),
            parameter=self.numbers[name],
            bucket=self.config.bucket_of(bits, is_grad=is_grad),
            rounding=ROUNDINGS.index(self.config.rounding_of(bits)),
        )
        layout = Layout([segment], self.world.groups[name])
        payload = torch.empty(layout.payload_bytes, dtype=torch.uint8)
        sent = values.contiguous().view(-1).view(torch.uint8)
        table = torch.tensor(layout.table([values.numel()]))
        torch.ops.qsdp.encode(sent, table, key.fold(), layout.header(0, 0), payload)
        received = torch.empty(values.shape, dtype=torch.float32 if is_grad else values.dtype)
        table = torch.tensor(layout.table([values.numel()], DType.FP32 if is_grad else None))
        torch.ops.qsdp.decode(payload, table, key.fold(), received.view(-1).view(torch.uint8))
        return received

    def _cut(self, name: str, whole: Tensor) -> list[Tensor]:
        """Rows of ceil(n / N), the last ones shorter or empty."""
        dim, size = self.world.shard_dims(name), self.world.world_size
        parts = list(whole.chunk(size, dim))
        empty = whole.narrow(dim, 0, 0)
        return [part.contiguous() for part in parts] + [empty] * (size - len(parts))

    def _join(self, name: str, rows: list[Tensor]) -> Tensor:
        return torch.cat(rows, self.world.shard_dims(name))


def grads_of(shards: Mapping[str, nn.Parameter]) -> list[Any]:
    """The shards that have a gradient."""
    return [parameter for parameter in shards.values() if parameter.grad is not None]


def groups_by_prefix(model: nn.Module, prefixes: Sequence[str]) -> dict[str, int]:
    """The group of each parameter: the longest of ``prefixes`` (module names, in the order of
    `modules()`, "" for the root) that its name starts with."""
    return {
        name: max(
            (i for i, prefix in enumerate(prefixes) if f"{name}.".startswith(_dotted(prefix))),
            key=lambda i: len(prefixes[i]),
        )
        for name, _ in model.named_parameters()
    }


def _dotted(prefix: str) -> str:
    return f"{prefix}." if prefix else ""


def _fp16_predivisor(divisor: float) -> float:
    """The power of two near sqrt(divisor) by which FSDP2 divides before an fp16 reduce."""
    before = 1.0
    while divisor % before == 0 and divisor / before > before:
        before *= 2
    return before
