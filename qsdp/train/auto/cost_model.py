"""What a training step takes by each way over the wire, predicted from what was measured.

Arithmetic only. [Note: Cost] The model is a root group (embeddings, last norm, head) and L equal
blocks. A gather or a reduce of a group has a busy part, which the processors do themselves, and an
idle part, a wait for the link beside which something else can be computed.

    forward    all busy parts + all computation + the root's and the first block's wait
               + (L - 1) max(0, gather - block)         each gather travels beside the block before
    backward   all busy parts + all computation + the first block's wait + the last reduce
               + (L - 1) max(0, gather + reduce - block)   both share the link; the root stays
                                                           gathered, its reduce comes last
    step       passes x (M forwards, M backwards, the last of them with reduces) + the optimizer

M are the micro-batches. Gathered once, the backward pass waits for nothing and only decodes. What
of a collective is busy:

- over NCCL nothing: collectives and codec run on streams of their own, stock FSDP2's too;
- of stock FSDP2 over gloo all of it: it waits for each collective where it is asked for;
- of qsdp over gloo the codec and the processor time of the transfer itself (sockets, copies), which
  the computation needs as well (on GPUs, whose payloads the host copies, all of it). Reduces are
  late, with micro-batches too: FSDP2 adds those up before the one reduce that the last of them has.

With N ranks and n values in a rank's shard a gather encodes n values and decodes N n; a reduce does
N - 1 times n of both. In two hops, over nodes of K ranks, the second gather hop brings what the
first brought and nothing hides it; the first reduce hop travels in 8 bits, for each rank of the
node and each node.

Gathered once, a rank keeps what all ranks sent of all blocks, and that is left out of the choice
where it takes more than a tenth of the memory that was free before there was a model, on the rank
with the least; what cannot be known counts as unlimited.

Left out are what all ways have in common (FSDP2's copies, norms, metrics), that payloads are
shorter while a method has pruned weights, and what qsdp alone does for each collective beside
codec and transfer (its hooks, headers that are compared, the meeting before a forward pass): where
a model is so small, and the link so fast, that these count, qsdp is predicted faster than it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STOCK = 32
"""Bits that stand for stock FSDP2."""
CODED = (8, 4)
"""Bits to choose from, never fewer: 3 cost about 0.02 nats (docs/results.md, Loss against bits)."""
LOCAL_BITS = 8
NEAR = 1.03
"""The most bits are taken that take at most this much of the fastest way's time."""
AS_FAST = 1.01
"""Of the ways with these bits one with less memory, or fewer hops, is taken that is as fast.
It takes at most this much of the fastest one's time: less, since what it spares costs no accuracy.
"""

MOST_KEPT = 0.1
"""The part of the free memory that gathering once may keep."""
FEW_BYTES = 1 << 18
"""A rank that sent fewer at a time does not know its link's rate, unless it never sends more."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What the cost model says of a collective: ``latency_s``, and bytes of each rank by a rate."""

    latency_s: float
    bytes_per_s: float
    busy: float
    """Which part of its time this process's processors work for it, 0 to 1."""
    num_bytes: int
    """What each rank brought when the rate was found."""

    def seconds(self, num_bytes: float) -> float:
        """What it takes where each rank brings ``num_bytes``."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class ModelledGroup:
    """A group of the cost model: the root's, or that of one block."""

    values: int
    """Values in a rank's padded shard."""
    gather_bytes: Mapping[int, int]
    """What a rank brings to a gather, by bits; STOCK: to FSDP2's."""
    reduce_bytes: Mapping[int, int]
    """What a rank sends to each other one, by bits; STOCK: its shard in FSDP2's reduce."""
    local_bytes: int
    """The same in the first hop of two."""
    forward_s: float
    backward_s: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the cost model is given, measured before the run begins: the same on all ranks."""

    num_ranks: int
    ranks_per_node: int
    """Ranks of a node; 1 where there are no several nodes of several ranks."""
    has_streams: bool
    """Whether collectives run beside the host: over NCCL."""
    num_blocks: int
    passes: int
    micro_batches: int
    root: ModelledGroup
    block: ModelledGroup
    free_bytes: int | None
    """Free memory on the rank with the least, before there is a model; None: not known."""
    optimizer_s: float
    encode_s: Mapping[int, float]
    """Seconds a value, by bits."""
    decode_s: Mapping[int, float]
    stock_gather: Transfer
    stock_reduce: Transfer
    gather: Transfer
    """qsdp's gather, over all ranks."""
    reduce: Transfer
    gather_across: Transfer | None = None
    """The gather between nodes; those of two hops are None where there are none."""
    gather_local: Transfer | None = None
    reduce_across: Transfer | None = None
    reduce_local: Transfer | None = None

    @property
    def compute_s(self) -> float:
        """Seconds of a step without any communication."""
        forward = self.root.forward_s + self.num_blocks * self.block.forward_s
        backward = self.root.backward_s + self.num_blocks * self.block.backward_s
        return self.passes * self.micro_batches * (forward + backward) + self.optimizer_s

    @property
    def link_mbit_per_s(self) -> float:
        """The rate at which a rank sends in qsdp's reduce, between nodes of several ranks each."""
        across = self.reduce if self.reduce_across is None else self.reduce_across
        num_peers = self.num_ranks // self.ranks_per_node - 1
        return num_peers * across.bytes_per_s * 8e-6

    @property
    def too_few_bytes(self) -> int | None:
        """The fewest bytes a rank sent at a time to find a rate, where that says little of it."""
        num_nodes = self.num_ranks // self.ranks_per_node
        gather, reduce = (
            max(sizes.values()) for sizes in (self.block.gather_bytes, self.block.reduce_bytes)
        )
        found = []
        for num_peers, transfer, most in (
            (self.num_ranks - 1, self.stock_gather, gather),
            (self.num_ranks - 1, self.stock_reduce, reduce),
            (self.num_ranks - 1, self.gather, gather),
            (self.num_ranks - 1, self.reduce, reduce),
            (num_nodes - 1, self.gather_across, gather),
            (num_nodes - 1, self.reduce_across, reduce),
            (self.ranks_per_node - 1, self.gather_local, gather),
            (self.ranks_per_node - 1, self.reduce_local, reduce),
        ):
            if transfer is not None and transfer.num_bytes < most:
                found.append(num_peers * transfer.num_bytes)
        fewest = min(found, default=FEW_BYTES)
        return fewest if fewest < FEW_BYTES else None

    def kept_bytes(self, way: WireWay) -> int:
        """Bytes that ``way`` keeps from the forward to the backward pass."""
        if way.gather != "once":
            return 0
        return self.num_ranks * self.num_blocks * self.block.gather_bytes[way.bits]


@dataclass(frozen=True, kw_only=True)
class WireWay:
    """A way over the wire whose cost is predicted."""

    bits: int
    gather: str = "twice"
    is_two_hop: bool = False

    def __str__(self) -> str:
        if self.bits == STOCK:
            return "stock FSDP2"
        return f"{self.bits} bits gathered {self.gather}{' in two hops' * self.is_two_hop}"

    def settings(self, *, has_nodes: bool) -> dict[str, Any]:
        """The flags that would have asked for it."""
        if self.bits == STOCK:
            return {"qsdp_bits": None}
        flags: dict[str, Any] = {"qsdp_bits": self.bits}
        if self.gather == "once":
            flags["qsdp_gather"] = "once"
        if has_nodes and not self.is_two_hop:  # two hops are what is done there by default
            flags["qsdp_reduce"] = "flat"
        return flags


@dataclass(frozen=True)
class Cost:
    """Seconds of one gather or reduce: see [Note: Cost]."""

    busy_s: float
    idle_s: float


def ways_to_compare(measured: Measured) -> list[WireWay]:
    """All ways that the cost model compares, the most welcome first."""
    hops = (False, True) if measured.gather_across is not None else (False,)
    free = math.inf if measured.free_bytes is None else measured.free_bytes
    every = [
        WireWay(bits=STOCK),
        *(
            WireWay(bits=bits, gather=gather, is_two_hop=is_two_hop)
            for bits in CODED
            for gather in ("twice", "once")
            for is_two_hop in hops
        ),
    ]
    return [way for way in every if measured.kept_bytes(way) <= MOST_KEPT * free]


def decide_by_cost(measured: Measured) -> tuple[WireWay, dict[WireWay, float]]:
    """The way to go by the cost model, and the seconds a step that each is predicted to take."""
    predicted = {way: step_s(measured, way) for way in ways_to_compare(measured)}
    limit = NEAR * min(predicted.values())
    bits = max(way.bits for way, seconds in predicted.items() if seconds <= limit)
    alike = {way: seconds for way, seconds in predicted.items() if way.bits == bits}
    limit = AS_FAST * min(alike.values())
    return next(way for way, seconds in alike.items() if seconds <= limit), predicted


def step_s(measured: Measured, way: WireWay) -> float:
    """Seconds a step: see [Note: Cost]."""
    root, block, blocks = measured.root, measured.block, measured.num_blocks
    gathers = [_gather_cost(measured, way, group) for group in (root, block)]
    reduces = [_reduce_cost(measured, way, group) for group in (root, block)]
    again = Cost(0.0, 0.0)  # the block's second gather
    if way.gather == "twice":
        again = gathers[1]
    else:
        decoding = measured.num_ranks * block.values * measured.decode_s[way.bits]
        again = Cost(0.0, decoding) if measured.has_streams else Cost(decoding, 0.0)
    forward = root.forward_s + blocks * block.forward_s
    forward += gathers[0].busy_s + blocks * gathers[1].busy_s
    forward += gathers[0].idle_s + gathers[1].idle_s
    forward += (blocks - 1) * max(0.0, gathers[1].idle_s - block.forward_s)

    def backward(reduced: list[Cost]) -> float:
        seconds = root.backward_s + blocks * block.backward_s
        seconds += reduced[0].busy_s + blocks * (again.busy_s + reduced[1].busy_s)
        seconds += again.idle_s + reduced[1].idle_s + reduced[0].idle_s
        beside = again.idle_s + reduced[1].idle_s
        return seconds + (blocks - 1) * max(0.0, beside - block.backward_s)

    nothing = Cost(0.0, 0.0)
    micro = measured.micro_batches
    one_pass = micro * forward + (micro - 1) * backward([nothing, nothing]) + backward(reduces)
    return measured.passes * one_pass + measured.optimizer_s


def _gather_cost(measured: Measured, way: WireWay, group: ModelledGroup) -> Cost:
    size = group.gather_bytes[way.bits]
    if way.bits == STOCK:
        return _stock_cost(measured, measured.stock_gather.seconds(size))
    codec = group.values * measured.encode_s[way.bits]
    codec += measured.num_ranks * group.values * measured.decode_s[way.bits]
    across, local = measured.gather_across, measured.gather_local
    if not way.is_two_hop or across is None or local is None:
        return _coded_cost(measured, codec, measured.gather, size)
    num_nodes = measured.num_ranks // measured.ranks_per_node
    return _coded_cost(measured, codec + local.seconds(num_nodes * size), across, size)


def _reduce_cost(measured: Measured, way: WireWay, group: ModelledGroup) -> Cost:
    size, encode, decode = group.reduce_bytes[way.bits], measured.encode_s, measured.decode_s
    if way.bits == STOCK:
        return _stock_cost(measured, measured.stock_reduce.seconds(size))
    both = group.values * (encode[way.bits] + decode[way.bits])
    across, local = measured.reduce_across, measured.reduce_local
    if not way.is_two_hop or across is None or local is None:
        return _coded_cost(measured, (measured.num_ranks - 1) * both, measured.reduce, size)
    width, num_nodes = measured.ranks_per_node, measured.num_ranks // measured.ranks_per_node
    in_node = group.values * (encode[LOCAL_BITS] + decode[LOCAL_BITS])
    codec = (width - 1) * num_nodes * in_node + (num_nodes - 1) * both
    first = local.seconds(num_nodes * group.local_bytes)
    return _coded_cost(measured, codec + first, across, size)


def _stock_cost(measured: Measured, seconds: float) -> Cost:
    return Cost(0.0, seconds) if measured.has_streams else Cost(seconds, 0.0)


def _coded_cost(measured: Measured, codec_s: float, transfer: Transfer, num_bytes: int) -> Cost:
    seconds = transfer.seconds(num_bytes)
    if measured.has_streams:
        return Cost(0.0, codec_s + seconds)
    busy = transfer.busy * seconds
    return Cost(codec_s + busy, seconds - busy)
