"""What crosses the wire in training, counted in one way for qsdp and for stock FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

import qsdp
from qsdp import compat
from qsdp.sparsity.threshold import THRESHOLD_BYTES
from qsdp.train.world import World


def threshold_bytes(world: World) -> int:
    """What a rank sends to find one pruning threshold, an all-reduce of histograms."""
    # An all-reduce sends every byte twice, but for this rank's own share.
    return 2 * (world.size - 1) * THRESHOLD_BYTES // world.size


@dataclass(frozen=True)
class WireBytes:
    """Bytes that one rank sent, cumulative."""

    sent: int = 0
    """Gathers and reduces of training, all that they carry."""
    other: int = 0
    """The gathers of validation and sampling, and the histograms that find pruning thresholds. Not
    counted: control messages of a few bytes (norms, sums of metrics, agreement among the ranks)
    and the metadata of checkpoints."""
    fp32: int = 0
    """The gathers and reduces of training in fp32, each value once: 4 (N - 1) / N bytes a value."""

    def since(self, before: WireBytes) -> WireBytes:
        return WireBytes(
            self.sent - before.sent, self.other - before.other, self.fp32 - before.fp32
        )


class Wire(Protocol):
    """How weights and gradients travel, and how many bytes that has taken."""

    def total(self) -> WireBytes: ...

    def reduced(self) -> None:
        """Note that a backward pass has reduced the gradients."""

    def other(self, num_bytes: int) -> None:
        """Note that this rank sent `num_bytes` which are neither weights nor gradients."""

    def evaluation(self, exact: bool) -> AbstractContextManager[None]:
        """Inside, gathers are `other`, and bring exact weights if `exact`."""


class QuantizedWire:
    """qsdp's own collectives and counters."""

    def __init__(self, handle: qsdp.Handle) -> None:
        self._handle = handle

    def total(self) -> WireBytes:
        counts = self._handle.traffic.snapshot()
        return WireBytes(
            counts["gather_sent_bytes"] + counts["reduce_sent_bytes"],
            counts["other_sent_bytes"],
            counts["gather_fp32_bytes"] + counts["reduce_fp32_bytes"],
        )

    def reduced(self) -> None:
        """The hooks have seen it."""

    def other(self, num_bytes: int) -> None:
        self._handle.traffic.other(num_bytes)

    @contextmanager
    def evaluation(self, exact: bool) -> Iterator[None]:
        with self._handle.traffic.paused(), self._handle.exact() if exact else nullcontext():
            yield


class StockWire:
    """The bytes of stock FSDP2, by arithmetic on its tables of padded shards.

    A forward pass gathers every group that is not gathered still, as the root is after a forward
    without autograd; a backward pass gathers all but the root's again and reduces all. A gather
    sends the own shard to N - 1 ranks. NCCL's reduce-scatter moves each value once, (N - 1) shards
    a rank; gloo's is an all-reduce inside and moves twice that.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._bytes = WireBytes()
        self._reduce_factor = 2 if world.backend == "gloo" else 1
        peers = world.size - 1
        self._reduce_sent = self._reduce_fp32 = 0
        for group in compat.parameter_groups(model):
            shards = group.parameters()
            sent = peers * sum(p.padded_numel * p.dtype.itemsize for p in shards)
            # Each value once: padding is sent, but not promised.
            fp32 = 4 * peers * sum(p.parameter.numel() for p in shards) // world.size
            self._reduce_sent += (
                self._reduce_factor * 4 * peers * sum(p.padded_numel for p in shards)
            )
            self._reduce_fp32 += fp32
            passes = 1 if group.module is cast(FSDPModule, model) else 2
            cast(nn.Module, group.module).register_forward_pre_hook(
                partial(self._count_forward, group, WireBytes(sent, 0, fp32), passes),
                prepend=True,  # before FSDP2's own, which gathers
            )

    def total(self) -> WireBytes:
        return self._bytes

    def reduced(self) -> None:
        # Gradients are reduced in fp32 at either precision.
        self._bytes = _plus(self._bytes, self._reduce_sent, self._reduce_fp32)

    def other(self, num_bytes: int) -> None:
        before = self._bytes
        self._bytes = WireBytes(before.sent, before.other + num_bytes, before.fp32)

    def evaluation(self, exact: bool) -> AbstractContextManager[None]:
        """Nothing to change: the weights are exact, and without autograd a forward is `other`."""
        return nullcontext()

    def _count_forward(
        self,
        group: compat.ParameterGroup,
        gather: WireBytes,
        passes: int,
        module: nn.Module,
        inputs: Any,
    ) -> None:
        if group.is_gathered:
            return
        if torch.is_grad_enabled():
            self._bytes = _plus(self._bytes, passes * gather.sent, passes * gather.fp32)
        else:
            self.other(gather.sent)


def _plus(total: WireBytes, sent: int, fp32: int) -> WireBytes:
    return WireBytes(total.sent + sent, total.other, total.fp32 + fp32)
