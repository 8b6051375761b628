"""What the simulated wire does to values: bits, keys, codes.

Written from the paper (QSDP, arXiv 2302.02390, section 4) and docs/design.md, apart from
`qsdp.comm` but for what is a function of numbers alone: the two check each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsdp import compat, ops
from qsdp.codec.payload import Layout, Segment
from qsdp.codec.rounding import Key
from qsdp.comm.bit_budget import Claim
from qsdp.common.dtypes import CODEC_DTYPES, DType
from qsdp.common.model_structure import embedding_names, tied_names
from qsdp.config import CODED_BITS, ROUNDINGS, QSDPConfig
from qsdp.simulation.adaptation import Bits, Budget, Levels
from qsdp.simulation.ranks import Numbers, World

GATHER, REDUCE, FROZEN = range(3)
FLAT, IN_NODE, BETWEEN_NODES, BETWEEN_REPLICAS = range(4)


class Codec(NamedTuple):
    """The operators' arguments for the values of one parameter."""

    layout: Layout
    encode_table: Tensor
    decode_table: Tensor


class Wire:
    """How each parameter travels.

    Args:
        model: The plain model, for names, shapes and which parameters are embeddings.
        config: Bits, buckets, roundings, hops.
        world: The ranks.
        numbers: Counter words of the generator.
        shard_dims: The sharded dimension of parameters that are not sharded along the first.

    Raises:
        ValueError: a policy pattern matches no parameter, or the budget is too small or has
            nothing to allot.
    """

    def __init__(
        self,
        model: nn.Module,
        config: QSDPConfig,
        world: World,
        numbers: Numbers,
        shard_dims: Mapping[str, int],
    ) -> None:
        tied, tables = tied_names(model), embedding_names(model)
        clean = compat.clean_names(model, {*tied, *tied.values(), *tables})
        aliases = {clean[alias]: clean[name] for alias, name in tied.items()}
        config.check_policy(list(numbers.parameters), aliases)
        self.config, self.world, self.numbers = config, world, numbers
        self.is_two_hop = world.is_two_hop(config)
        self._shard_dims = shard_dims
        self._codecs: dict[tuple[Segment, int, bool], Codec] = {}
        embeddings, named = {clean[name] for name in tables}, compat.named_parameters(model)
        config.check_embeddings(embeddings)
        self._bits: Bits = {
            name: _bits(name, parameter, config, name in embeddings)
            for name, parameter in named.items()
        }
        self._kept: Mapping[str, list[Tensor]] = {}
        self._sparse_grads = True
        order = sorted(self._bits, key=lambda n: (numbers.groups[n], numbers.parameters[n]))
        weights, grads = (
            {
                name: self._claim(name, named[name], is_grad, name in embeddings)
                for name in order
                if self._bits[name][is_grad] <= 8
            }
            for is_grad in (False, True)
        )
        self._levels, self._budget = Levels(config), Budget(config, world, (weights, grads))
        self._levels.watch(0, self._bits)

    def advance(self, step: int, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """Allot bits and learn levels if they are due before ``step``. ``shards`` are those of
        the ranks of the shard group, which all replicas have alike."""
        config, world = self.config, self.world
        if self._budget.is_open(step - 1):
            for rank in range(world.num_ranks):
                own = rank % world.world_size
                for name, shard in shards[own].items():
                    sent, is_frozen = self._sent(name, shard, own), self.is_sent_once(shard)
                    self._measure(name, sent, rank, is_grad=False, is_frozen=is_frozen)
            self._bits = self._budget.allot(self._bits)
        if step in config.learning_steps:
            for rank, parameters in list(enumerate(shards)) * world.replicas:
                for name, shard in parameters.items():
                    if not self.is_sent_once(shard):  # on the uniform grid
                        place = (name, self._kind(name), self.weight_bits(name, None))
                        self._levels.observe(place, self._sent(name, shard, rank))
            self._levels.learn()
        self._levels.watch(step, self._bits)

    def set_support(self, masks: Mapping[str, Tensor], *, with_grads: bool) -> None:
        """Let only the weights that ``masks``, of whole parameters, keep travel from now on, and
        with ``with_grads`` only their gradients."""
        self._kept = {name: self.cut(name, mask) for name, mask in masks.items()}
        self._sparse_grads = with_grads
        self._codecs.clear()  # what other masks leave has other sizes

    @property
    def is_sparse(self) -> bool:
        return bool(self._kept)

    def kept_grads(self, name: str, row: Tensor, receiver: int) -> Tensor:
        """What travels of a row that ``receiver`` is to own: all, or the kept values, 1-D."""
        is_sparse = self._sparse_grads and name in self._kept
        return row[self._kept[name][receiver]] if is_sparse else row

    def whole_grads(self, name: str, row: Tensor, receiver: int) -> Tensor:
        """The inverse of `kept_grads`, with zeros."""
        if not self._sparse_grads or name not in self._kept:
            return row
        keep = self._kept[name][receiver]
        return torch.zeros(keep.shape, dtype=row.dtype).masked_scatter_(keep, row)

    def weight_dtype(self, shard: Tensor) -> torch.dtype:
        """Of the parameter once gathered."""
        return self.world.param_dtype if shard.is_floating_point() else shard.dtype

    def weight_bits(self, name: str, step: int | None) -> int:
        """Bits of a weight in ``step`` of the clock; None is any step after the warm-up."""
        return self._warm(self._bits[name][0], step)

    def grad_bits(self, name: str, hop: int, step: int | None) -> int:
        """Bits of a gradient in ``hop`` of a reduce in ``step``; None as above."""
        bits = self._bits[name][1]
        if hop == IN_NODE and bits <= 8:
            bits = self.config.local_grad_bits or max(bits, 8)
        return self._warm(bits, step)

    def is_sent_once(self, shard: Tensor) -> bool:
        """Whether the payload of a parameter is kept for good."""
        return self.config.gather == "once" and not shard.requires_grad

    def weight(self, name: str, shard: Tensor, rank: int, step: int) -> Tensor:
        """What all ranks compute with of the shard of ``rank`` in the shard group."""
        values, sent = self._gathered(shard), self._sent(name, shard, rank)
        if self.world.world_size == 1:
            return values  # FSDP2 calls no collective
        if self.is_sent_once(shard):
            # Whichever step it is sent in: a resumed run sends it again and must decode the same.
            key = Key(self.config.seed, 0, FROZEN, 0, 0, rank).fold()
            bits = self.weight_bits(name, None)
            return self._cross(name, sent, key, bits, is_grad=False, is_frozen=True)
        key = Key(self.config.seed, step, GATHER, 0, 0, rank).fold()
        bits = self.weight_bits(name, step)
        decoded = self._cross(name, sent, key, bits, is_grad=False)
        if name not in self._kept:
            return decoded
        return torch.zeros_like(values).masked_scatter_(self._kept[name][rank], decoded)

    def grad(
        self, name: str, row: Tensor, hop: int, step: int, sender: int, receiver: int
    ) -> Tensor:
        """What is decoded of ``row``, in fp32.

        ``sender`` is a global rank; ``receiver`` is the rank in the shard group for which the row
        is meant in the end.
        """
        key = Key(self.config.seed, step, REDUCE, hop, 0, sender, receiver).fold()
        bits = self.grad_bits(name, hop, step)
        self._levels.observe((name, "grad", bits), row)
        if bits <= 8 and self._budget.is_open(step):
            self._measure(name, row, sender, is_grad=True)
        return self._cross(name, row, key, bits, is_grad=True)

    def cut(self, name: str, whole: Tensor) -> list[Tensor]:
        """Rows of ceil(n / N), the last ones shorter or empty."""
        dim, size = self._shard_dims.get(name, 0), self.world.world_size
        parts = list(whole.chunk(size, dim))
        empty = whole.narrow(dim, 0, 0)
        return [part.contiguous() for part in parts] + [empty] * (size - len(parts))

    def join(self, name: str, rows: list[Tensor]) -> Tensor:
        """The inverse of `cut`."""
        return torch.cat(rows, self._shard_dims.get(name, 0))

    def segment(
        self, name: str, numel: int, dtype: torch.dtype, bits: int, *, is_grad: bool
    ) -> Segment:
        """``numel`` values of a parameter, in ``dtype``, as ``bits`` a value."""
        own = CODEC_DTYPES.get(dtype, DType.OPAQUE)
        return Segment(
            bits=bits if bits <= 8 else 0,
            dtype=own,
            wire=DType.BF16 if bits == 16 and own == DType.FP32 else own,
            padded=numel if own != DType.OPAQUE else numel * dtype.itemsize,
            parameter=self.numbers.parameters[name],
            bucket=self.config.bucket_of(bits, is_grad=is_grad),
            rounding=ROUNDINGS.index(self.config.rounding_of(bits)),
        )

    def _claim(self, name: str, whole: Tensor, is_grad: bool, is_embedding: bool) -> Claim:
        """Every rank's payload has room for the first rank's shard."""
        kept = self._bits[name][is_grad] if self.config.keeps_bits(name, is_embedding) else None
        padded = self.cut(name, whole)[0].numel()
        return Claim(whole.numel(), padded, self.world.world_size, kept)

    def _gathered(self, shard: Tensor) -> Tensor:
        return shard.detach().to(self.weight_dtype(shard))

    def _sent(self, name: str, shard: Tensor, rank: int) -> Tensor:
        """What travels of the shard of ``rank`` in the shard group: all, or the kept values, 1-D.
        What is sent once is sent whole."""
        values = self._gathered(shard)
        is_sparse = name in self._kept and not self.is_sent_once(shard)
        return values[self._kept[name][rank]] if is_sparse else values

    def _kind(self, name: str, is_grad: bool = False) -> str:
        """Which levels serve a parameter's values: kept weights have few near zero."""
        return "grad" if is_grad else "kept" if name in self._kept else "weight"

    def _measure(
        self, name: str, values: Tensor, rank: int, *, is_grad: bool, is_frozen: bool = False
    ) -> None:
        """Add the squared errors of ``values`` at all bits to those of ``rank``."""
        if self._bits[name][is_grad] > 8 or not values.numel():
            return
        exact = values.float()
        for bits in CODED_BITS:
            decoded = self._cross(name, values, 0, bits, is_grad=is_grad, is_frozen=is_frozen)
            error = float((decoded.float() - exact).double().square().sum())
            self._budget.add((name, is_grad, bits), rank, error)

    def _cross(
        self,
        name: str,
        values: Tensor,
        key: int,
        bits: int,
        *,
        is_grad: bool,
        is_frozen: bool = False,
    ) -> Tensor:
        """Encode and decode: weights in their own dtype, gradients into fp32."""
        dtype = torch.float32 if is_grad else values.dtype
        if bits == 32 or not values.numel():
            return values.to(dtype)
        segment = self.segment(name, values.numel(), values.dtype, bits, is_grad=is_grad)
        # What is sent once keeps the uniform grid: levels may be learned anew.
        levels = None if is_frozen else self._levels.of((name, self._kind(name, is_grad), bits))
        if levels is not None:
            segment = replace(segment, levels=0)
        layout, encode_table, decode_table = self._codec(name, segment, is_grad)
        payload = torch.empty(layout.payload_bytes, dtype=torch.uint8, device=values.device)
        sent = values.contiguous().view(-1).view(torch.uint8)
        ops.encode(sent, encode_table, key, layout.header(0, 0), payload, levels)
        received = torch.empty(values.shape, dtype=dtype, device=values.device)
        buffer = received.view(-1).view(torch.uint8)
        ops.decode(payload, decode_table, key, buffer, levels=levels)
        return received

    def _codec(self, name: str, segment: Segment, is_grad: bool) -> Codec:
        place = (segment, self.numbers.groups[name], is_grad)
        if place not in self._codecs:
            layout = Layout([segment], self.numbers.groups[name])
            encode, decode = (
                torch.tensor(layout.table([segment.padded], dtype))
                for dtype in (None, DType.FP32 if is_grad else None)
            )
            self._codecs[place] = Codec(layout, encode, decode)
        return self._codecs[place]

    def _warm(self, bits: int, step: int | None) -> int:
        is_warm_up = step is not None and step < self.config.warmup_steps
        return max(bits, self.config.least_warmup_bits) if is_warm_up else bits


class Reduction:
    """One reduce of all ranks, which bring their gradients in the order of their ranks.

    flat      every row but a rank's own is quantized; rows are added in fp32 in rank order
    two hops  inside a node every row is quantized for the local rank of its destination; each node
              then quantizes its fp32 sum for the destination, where sums are added in node order.
              What a rank keeps to itself is exact in both hops (after ZeRO++, arXiv 2306.10209)
    replicas  native: added in the reduce dtype. Quantized: every replica's sum, the own one too, is
              quantized; they are added in fp32 in replica order and divided by their number
    """

    def __init__(self, wire: Wire, step: int) -> None:
        self._wire, self._step = wire, step
        world = wire.world
        # What FSDP2 divides by: it knows of replicas only when the all-reduce is its own.
        self._divisor = float(
            world.world_size * (1 if world.quantized_replicas else world.replicas)
        )
        self._before = 1.0
        if world.reduce_dtype == torch.float16:
            self._before = _fp16_predivisor(self._divisor)
        self._num_added = 0
        self._names: set[str] = set()
        self._node: dict[tuple[str, int], Tensor] = {}
        self._shards: dict[tuple[str, int], Tensor] = {}
        self._replicas: dict[tuple[str, int], Tensor] = {}

    def add(self, grads: Mapping[str, Tensor]) -> None:
        """Bring the whole gradients of the next rank.

        Raises RuntimeError when it has gradients for other parameters than the ranks before it.
        """
        world = self._wire.world
        sender, self._num_added = self._num_added, self._num_added + 1
        rank = sender % world.world_size
        odd = sorted(grads.keys() ^ self._names)
        if sender and odd:
            raise RuntimeError(
                f"rank {sender} and the ranks before it differ in whether {odd[0]} gets a "
                "gradient, where FSDP2 would fail; let all ranks use the same parameters"
            )
        self._names = set(grads)
        for name, grad in grads.items():
            for receiver, whole in enumerate(self._wire.cut(name, grad.div(self._before))):
                row = self._wire.kept_grads(name, whole, receiver)
                if self._wire.is_two_hop:
                    self._add_in_node(name, row, sender, receiver)
                else:
                    is_own = rank == receiver
                    self._add(self._shards, name, row, FLAT, sender, receiver, is_own)
        if self._wire.is_two_hop and (rank + 1) % world.ranks_of_a_node == 0:
            self._add_between_nodes(sender // world.ranks_of_a_node)
        if rank == world.world_size - 1:
            self._add_between_replicas(sender // world.world_size)

    def results(self) -> Iterable[tuple[str, int, Tensor]]:
        """(name, rank in the shard group, mean gradient in the reduce dtype)."""
        world = self._wire.world
        assert self._num_added == world.num_ranks
        for (name, receiver), total in self._replicas.items():
            if world.quantized_replicas:
                total = total.div(float(world.replicas)).to(world.reduce_dtype)
            mean = total.div(self._divisor / self._before)
            yield name, receiver, self._wire.whole_grads(name, mean, receiver)

    def _add_in_node(self, name: str, row: Tensor, sender: int, receiver: int) -> None:
        local = self._wire.world.ranks_of_a_node
        is_own = sender % local == receiver % local
        self._add(self._node, name, row, IN_NODE, sender, receiver, is_own)

    def _add_between_nodes(self, node: int) -> None:
        """Send the sums of ``node``, counted over all replicas."""
        world = self._wire.world
        local = world.ranks_of_a_node
        here = node % (world.world_size // local)
        for (name, receiver), total in self._node.items():
            sender = node * local + receiver % local
            is_own = receiver // local == here
            self._add(self._shards, name, total, BETWEEN_NODES, sender, receiver, is_own)
        self._node.clear()

    def _add_between_replicas(self, replica: int) -> None:
        world = self._wire.world
        for place, total in self._shards.items():
            name, receiver = place
            total = total.to(world.reduce_dtype)
            if world.quantized_replicas:
                sender = replica * world.world_size + receiver
                self._add(self._replicas, name, total, BETWEEN_REPLICAS, sender, receiver, False)
            elif place in self._replicas:
                self._replicas[place] = self._replicas[place] + total
            else:
                self._replicas[place] = total
        self._shards.clear()

    def _add(
        self,
        sums: dict[tuple[str, int], Tensor],
        name: str,
        row: Tensor,
        hop: int,
        sender: int,
        receiver: int,
        is_own: bool,
    ) -> None:
        """Add a row in fp32: as it is, or as it is decoded."""
        if is_own:
            row = row.float()
        else:
            row = self._wire.grad(name, row, hop, self._step, sender, receiver)
        place = (name, receiver)
        sums[place] = sums[place] + row if place in sums else row


def _bits(name: str, parameter: Tensor, config: QSDPConfig, is_embedding: bool) -> tuple[int, int]:
    """Weight and gradient bits after the warm-up; 32 is raw."""
    if not parameter.is_floating_point():
        return 32, 32
    if parameter.dim() < 2 and config.bits_by_policy(name) is None:
        return 32, 32
    return config.bits_of(name, is_embedding)


def _fp16_predivisor(divisor: float) -> float:
    """The power of two near sqrt(divisor) by which FSDP2 divides before an fp16 reduce."""
    before = 1.0
    while divisor % before == 0 and divisor / before > before:
        before *= 2
    return before
