"""What crosses the wire in training, counted in one way for qsdp and for stock FSDP2."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

import qsdp
from qsdp.compat.parameter_group import ParameterGroup, parameter_groups
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.threshold import THRESHOLD_BYTES
from qsdp.train.world import World

SECONDS = (
    *("gather_encode_s", "gather_wire_s", "gather_decode_s"),
    *("reduce_encode_s", "reduce_wire_s", "reduce_decode_s"),
)
"""The parts of ``WireUse`` that are times."""


def threshold_bytes(target: Compression, num_matrices: int, num_shards: int) -> int:
    """What a rank sends to find the thresholds of ``target``: all-reduces of histograms."""
    num_thresholds = 0 if not target.sparsity else num_matrices if target.scope == "layer" else 1
    # An all-reduce sends every byte twice, but for this rank's own share.
    return 2 * (num_shards - 1) * THRESHOLD_BYTES * num_thresholds // num_shards


@dataclass(frozen=True, kw_only=True)
class WireUse:
    """Bytes on the wire of one rank, and their seconds, cumulative; NaN where nobody knows."""

    gather_bytes: float = 0.0
    """Gathers of training, all that they carry."""
    reduce_bytes: float = 0.0
    """Reduces of training, those between replicas included."""
    gather_inter_node_bytes: float = 0.0
    """The part of ``gather_bytes`` that left the node."""
    reduce_inter_node_bytes: float = 0.0
    """The part of ``reduce_bytes`` that left the node."""
    other_bytes: float = 0.0
    """Gathers of validation and sampling, and histograms for pruning thresholds or levels.
    Not counted: control messages (norms, sums of metrics, agreement among the ranks, a few bytes a
    parameter where errors are measured) and the metadata of checkpoints.
    """
    fp32_bytes: float = 0.0
    """The gathers and reduces of training in fp32, each value once: 4 (N - 1) / N bytes a value."""
    changed_codes: float = 0.0
    """With --qsdp-gather delta, codes of weights that changed on the grids they were on."""
    redrawn_buckets: float = 0.0
    """And buckets whose grids were drawn again. Both are of all ranks."""
    gather_encode_s: float = 0.0
    gather_wire_s: float = 0.0
    gather_decode_s: float = 0.0
    reduce_encode_s: float = 0.0
    reduce_wire_s: float = 0.0
    reduce_decode_s: float = 0.0

    @property
    def sent_bytes(self) -> float:
        """Bytes of gathers and reduces of training."""
        return self.gather_bytes + self.reduce_bytes

    def __add__(self, more: WireUse) -> WireUse:
        other = asdict(more)
        return WireUse(**{name: value + other[name] for name, value in asdict(self).items()})

    def __sub__(self, before: WireUse) -> WireUse:
        other = asdict(before)
        return WireUse(**{name: value - other[name] for name, value in asdict(self).items()})


class Wire(Protocol):
    """How weights and gradients travel in a run, and the bytes on the wire that it has taken."""

    def total(self) -> WireUse:
        """What this rank has used so far."""

    def reduced(self) -> None:
        """Note that a backward pass has reduced the gradients."""

    def other(self, num_bytes: float) -> None:
        """Note that this rank sent ``num_bytes`` which are neither weights nor gradients."""

    def evaluation(self, exact: bool) -> AbstractContextManager[None]:
        """Inside, gathers are ``other``, and bring exact weights if ``exact``."""


class QuantizedWire:
    """The quantized wire: bytes and seconds as qsdp's own collectives count them."""

    def __init__(self, handle: qsdp.Handle) -> None:
        self._handle = handle

    def total(self) -> WireUse:
        """What qsdp's counters and clocks say so far."""
        counts = self._handle.traffic.snapshot()
        return WireUse(
            gather_bytes=counts["gather_sent_bytes"],
            reduce_bytes=counts["reduce_sent_bytes"],
            gather_inter_node_bytes=counts["gather_inter_node_bytes"],
            reduce_inter_node_bytes=counts["reduce_inter_node_bytes"],
            other_bytes=counts["other_sent_bytes"],
            fp32_bytes=counts["gather_fp32_bytes"] + counts["reduce_fp32_bytes"],
            changed_codes=counts.get("changed_codes", 0),
            redrawn_buckets=counts.get("redrawn_buckets", 0),
            **self._handle.times.snapshot(),
        )

    def reduced(self) -> None:
        """Do nothing: the hooks have seen it."""

    def other(self, num_bytes: float) -> None:
        """Note ``num_bytes`` in qsdp's counters."""
        self._handle.traffic.other(int(num_bytes))

    @contextmanager
    def evaluation(self, exact: bool) -> Iterator[None]:
        """Inside, the counters of training pause, and weights are exact if ``exact``."""
        with self._handle.traffic.paused(), self._handle.exact() if exact else nullcontext():
            yield


class StockWire:
    """The bytes of stock FSDP2, by arithmetic on its tables of padded shards.

    A forward pass gathers every group that is not gathered still, as the root is after a forward
    without autograd; a backward pass gathers all but the root's again and reduces all. A gather
    sends the own shard to S - 1 ranks, where S ranks share a replica. NCCL's reduce-scatter moves
    each value once, (S - 1) shards a rank; gloo's is an all-reduce inside and moves twice that. R
    replicas all-reduce the reduced shard: 2 (R - 1) / R of its bytes.

    FSDP2 does not say what its collectives take, so the seconds are NaN.
    """

    def __init__(self, model: nn.Module, world: World, num_replicas: int) -> None:
        self._total = WireUse(**dict.fromkeys(SECONDS, math.nan))
        num_shards = world.size // num_replicas
        first = world.rank - world.rank % num_shards
        gather_crosses = _crosses(world, first + (world.rank + 1) % num_shards)
        reduce_crosses = _crosses(world, first + (world.rank - 1) % num_shards)
        average_crosses = _crosses(world, (world.rank - num_shards) % world.size)
        times_scattered = 2 if world.backend == "gloo" else 1
        self._reduce = WireUse()
        self._gathers: list[tuple[ParameterGroup, list[WireUse]]] = []
        for group in parameter_groups(model):
            shards = group.parameters()
            gathered = (num_shards - 1) * sum(p.padded_numel * p.dtype.itemsize for p in shards)
            # Gradients are reduced in fp32 at either precision.
            shard_fp32 = 4 * sum(p.padded_numel for p in shards)
            # Each value once: padding is sent, but not promised.
            own_fp32 = 4 * sum(p.parameter.numel() for p in shards) / num_shards
            fp32 = (num_shards - 1) * own_fp32
            scattered = times_scattered * (num_shards - 1) * shard_fp32
            averaged = 2 * (num_replicas - 1) * shard_fp32 / num_replicas
            gather = WireUse(
                gather_bytes=gathered,
                gather_inter_node_bytes=gather_crosses * gathered,
                fp32_bytes=fp32,
            )
            self._reduce += WireUse(
                reduce_bytes=scattered + averaged,
                reduce_inter_node_bytes=reduce_crosses * scattered + average_crosses * averaged,
                fp32_bytes=fp32 + 2 * (num_replicas - 1) * own_fp32 / num_replicas,
            )
            is_root = group.module is cast(FSDPModule, model)
            # See [Note: Hooks].
            hook = partial(_count_forward, weakref.ref(self), len(self._gathers))
            self._gathers.append((group, [gather] if is_root else [gather, gather]))
            # Before FSDP2's own, which gathers.
            cast(nn.Module, group.module).register_forward_pre_hook(hook, prepend=True)

    def total(self) -> WireUse:
        """What FSDP2 has sent so far, by arithmetic."""
        return self._total

    def reduced(self) -> None:
        """Add what a backward pass reduces."""
        self._total += self._reduce

    def other(self, num_bytes: float) -> None:
        """Add ``num_bytes``."""
        self._total += WireUse(other_bytes=num_bytes)

    def evaluation(self, exact: bool) -> AbstractContextManager[None]:
        """Change nothing: the weights are exact, and without autograd a forward is ``other``."""
        return nullcontext()

    def count_forward(self, index: int) -> None:
        """Note that the module of a group begins a forward pass."""
        group, gathers = self._gathers[index]
        if group.is_gathered:
            return
        if torch.is_grad_enabled():
            for gather in gathers:
                self._total += gather
        else:
            self.other(gathers[0].gather_bytes)


def _count_forward(counter: weakref.ref[StockWire], index: int, *_: object) -> None:
    if (wire := counter()) is not None:
        wire.count_forward(index)


def _crosses(world: World, neighbour: int) -> float:
    """Which part of what this rank sends to the ``neighbour`` in a ring leaves the node: 0 or 1.

    gloo's rings follow the ranks: its all-gather sends to the next rank alone, its all-reduce to
    the one before. NCCL lays rings and trees of its own, and which rank's bytes cross is not known:
    NaN, unless there is one node.
    """
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_here >= world.size:
        return 0.0
    if world.backend != "gloo":
        return math.nan
    # Nodes may differ in size, so that a rank's number alone does not tell where its node begins.
    first = world.rank - int(os.environ.get("LOCAL_RANK", world.rank % num_here))
    return float(neighbour not in range(first, first + num_here))
