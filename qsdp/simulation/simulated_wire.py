"""What the simulated wire does to values: bits, keys, codes.

Written from the paper (QSDP, arXiv 2302.02390, section 4) and docs/design.md, apart from
``qsdp.comm`` except what is a function of numbers alone: the two check each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from qsdp.codec.random_numbers import KeyDirection, KeyStage, RandomKey
from qsdp.comm.bit_budget import Claim
from qsdp.comm.policy_checks import check_embeddings, check_policy
from qsdp.common.model_structure import embedding_names, tied_names
from qsdp.compat.parameter_names import clean_names, named_parameters
from qsdp.config import CODED_BITS, QSDPConfig
from qsdp.simulation.kept_weights import KeptWeights
from qsdp.simulation.levels_and_budget import Bits, SimulatedBudget, SimulatedLevels
from qsdp.simulation.numbering import Numbering
from qsdp.simulation.ranks import SimulatedRanks
from qsdp.simulation.simulated_codec import SimulatedCodec
from qsdp.simulation.simulated_grids import Form, SimulatedGrids
from qsdp.simulation.simulated_shards import SimulatedSharding
from qsdp.simulation.stages import simulated_stages


class SimulatedWire:
    """The simulated wire: how each parameter travels.

    Args:
        model: The plain model, for names, shapes and which parameters are embeddings.
        config: Bits, buckets, roundings, stages.
        world: The ranks.
        numbers: Counter words of the generator.
        sharding: How parameters are cut.

    Raises:
        ValueError: A policy pattern matches no parameter, the budget is too small or has nothing
            to allot, or ranks do not fill nodes as the reduce needs it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: QSDPConfig,
        world: SimulatedRanks,
        numbers: Numbering,
        sharding: SimulatedSharding,
    ) -> None:
        tied, tables = tied_names(model), embedding_names(model)
        clean = clean_names(model, {*tied, *tied.values(), *tables})
        aliases = {clean[alias]: clean[name] for alias, name in tied.items()}
        check_policy(config, list(numbers.parameters), aliases)
        self.config, self.world, self.numbers, self.sharding = config, world, numbers, sharding
        self.stages = simulated_stages(world, config)
        self.codec = SimulatedCodec(config, numbers)
        self.grids = None
        """What all ranks of a shard group keep; None unless only changes are gathered."""
        if config.gather == "delta":
            self.grids = SimulatedGrids(config.room, config.redraw_every)
        self.is_aside = False
        """Whether weights travel fresh, so that what is kept stays as it is."""
        embeddings, named = {clean[name] for name in tables}, named_parameters(model)
        self._keeps_bits = {n for n in named if config.keeps_bits(n, n in embeddings)}
        check_embeddings(config, embeddings)
        self._bits: Bits = {
            name: _bits(name, parameter, config, name in embeddings)
            for name, parameter in named.items()
        }
        self.kept_weights = self.kept_grads = KeptWeights({}, sharding)
        order = sorted(self._bits, key=lambda n: (numbers.groups[n], numbers.parameters[n]))
        weights, grads = (
            {
                name: self._claim(name, named[name], is_grad, name in embeddings)
                for name in order
                if self._bits[name][is_grad] <= 8
            }
            for is_grad in (False, True)
        )
        self._levels, self._budget = (
            SimulatedLevels(config),
            SimulatedBudget(config, world, (weights, grads)),
        )
        self._levels.watch(0, self._bits)

    def advance(self, step: int, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """Allot bits and learn levels if they are due before ``step``.

        ``shards`` are those of the ranks of the shard group, which all replicas have alike.
        """
        if self._budget.is_open(step - 1):
            if self.config.budget is not None:
                self._measure_weights(step, shards)
            self._bits = self._budget.allot(self._bits)
        if step in self.config.learning_steps:
            for rank, parameters in list(enumerate(shards)) * self.world.replicas:
                for name, shard in parameters.items():
                    if not self.is_sent_once(shard, step):  # on the uniform grid
                        place = (name, self._kind(name), self.weight_bits(name, None))
                        self._levels.observe(place, self._sent(name, shard, rank))
            self._levels.learn()
        self._levels.watch(step, self._bits)

    def set_support(self, masks: Mapping[str, Tensor], *, with_grads: bool) -> None:
        """Let only the weights that ``masks`` of whole parameters keep travel from now on.

        With ``with_grads``, only their gradients travel too.
        """
        self.kept_weights = KeptWeights(masks, self.sharding)
        self.kept_grads = KeptWeights(masks if with_grads else {}, self.sharding)
        self.codec.forget()

    def weight_dtype(self, shard: Tensor) -> torch.dtype:
        """The dtype of the parameter once gathered."""
        return self.world.param_dtype if shard.is_floating_point() else shard.dtype

    def weight_bits(self, name: str, step: int | None) -> int:
        """Bits of a weight in ``step`` of the clock; None is any step after the warm-up."""
        return self._warm(self._bits[name][0], step)

    def grad_bits(self, name: str, stage: KeyStage, step: int | None) -> int:
        """Bits of a gradient in ``stage`` of a reduce in ``step``; None as above."""
        bits = self._bits[name][1]
        if stage == KeyStage.LOCAL and bits <= 8:
            bits = self.config.local_grad_bits or max(bits, 8)
        return self._warm(bits, step)

    def keeps_codes(self, step: int | None) -> bool:
        """Whether weights are decoded from kept codes in ``step``, None as above; else fresh."""
        return self.grids is not None and not self.is_aside and not self._is_warm_up(step)

    def is_sent_once(self, shard: Tensor, step: int | None) -> bool:
        """Whether a payload of ``step``, None as above, is kept until the parameter is edited."""
        is_cached = self.config.gather != "twice" and not self.keeps_codes(step)
        return is_cached and not shard.requires_grad

    def begin_gather(self, step: int) -> None:
        """Let all grids that fit bits and support no longer be drawn anew in a gather in ``step``.

        They are those of a whole group.
        """
        if self.grids is None or not self.keeps_codes(step):
            return
        forms: dict[int, Form] = {}
        for name, group in self.numbers.groups.items():
            form = self._bits[name][0], self.kept_weights.sums.get(name)
            forms[group] = (*forms.get(group, ()), form)
        for group, form_of_group in forms.items():
            self.grids.fit(group, form_of_group)

    def end_gather(self, step: int) -> None:
        """Count what all ranks have sent of changes since a gather in ``step`` was begun."""
        if self.grids is not None:
            sizes = Counter(self.numbers.groups.values())
            self.grids.frames.end_gather(step, sizes.__getitem__)

    def weight(self, name: str, shard: Tensor, rank: int, step: int) -> Tensor:
        """What all ranks compute with of the shard of ``rank`` in the shard group."""
        values, seed = self._gathered(shard), self.config.seed
        if self.world.world_size == 1:
            return values  # FSDP2 calls no collective
        if self.is_sent_once(shard, step):
            # Whichever step it is sent in: a resumed run sends it again and must decode the same.
            key = RandomKey(seed, 0, KeyDirection.FROZEN, KeyStage.FLAT, 0, rank).fold()
            bits = self.weight_bits(name, None)
            return self._cross(name, values, key, bits, is_grad=False, is_frozen=True)
        bits, sent = self.weight_bits(name, step), self._sent(name, shard, rank)
        if self.grids is not None and self.keeps_codes(step) and bits <= 8 and sent.numel():
            row = self.codec.kept_row(name, sent, bits)
            key = RandomKey(seed, 0, KeyDirection.KEPT, KeyStage.FLAT, 0, rank).fold()
            group = self.numbers.groups[name]
            decoded = self.grids.gather(group, (name, rank), sent, row, key, step, shard)
        else:
            key = RandomKey(seed, step, KeyDirection.GATHER, KeyStage.FLAT, 0, rank).fold()
            decoded = self._cross(name, sent, key, bits, is_grad=False)
            if self.grids is not None and self.keeps_codes(step) and sent.numel():
                row = self.codec.kept_row(name, sent, bits)
                self.grids.frames.say_raw(self.numbers.groups[name], (name, rank), row, decoded)
        return self.kept_weights.spread(name, decoded, rank)

    def rewind_point(self) -> Callable[[Collection[int | None]], None]:
        """A function that takes back gathers since, but of the groups that it is given."""
        return (lambda _: None) if self.grids is None else self.grids.rewind_point()

    def grad(
        self, name: str, row: Tensor, stage: KeyStage, step: int, sender: int, receiver: int
    ) -> Tensor:
        """What is decoded of ``row``, in fp32.

        ``sender`` is a global rank; ``receiver`` is the rank in the shard group for which the row
        is meant in the end.
        """
        key = RandomKey(self.config.seed, step, KeyDirection.REDUCE, stage, 0, sender, receiver)
        bits = self.grad_bits(name, stage, step)
        self._levels.observe((name, "grad", bits), row)
        if bits <= 8 and self._budget.is_open(step):
            self._measure(name, row, sender, is_grad=True)
        return self._cross(name, row, key.fold(), bits, is_grad=True)

    def rotated(self, name: str, row: Tensor, step: int) -> Tensor:
        """What a reduce in ``step`` adds up in place of a gradient's ``row``; and the way back."""
        bits = self.grad_bits(name, KeyStage.FLAT, step)
        keeps_bits = name in self._keeps_bits
        if self.world.world_size == 1 or not self.config.rotates(bits, keeps_bits=keeps_bits):
            return row
        return self.codec.rotated(row, self.config.bucket_of(bits, is_grad=True))

    def _claim(self, name: str, whole: Tensor, is_grad: bool, is_embedding: bool) -> Claim:
        """The claim of one parameter: every rank's payload has room for the first rank's shard."""
        is_allotted = self.config.budget_of(is_grad=is_grad) is not None
        is_kept = not is_allotted or self.config.keeps_bits(name, is_embedding)
        kept = self._bits[name][is_grad] if is_kept else None
        padded = self.sharding.cut(name, whole)[0].numel()
        return Claim(whole.numel(), padded, self.world.world_size, kept)

    def _gathered(self, shard: Tensor) -> Tensor:
        return shard.detach().to(self.weight_dtype(shard))

    def _sent(self, name: str, shard: Tensor, rank: int, *, is_whole: bool = False) -> Tensor:
        """What travels of the shard of ``rank`` in the shard group: all, or the kept values, 1-D.

        ``is_whole``: it is sent once, so whole.
        """
        values = self._gathered(shard)
        return values if is_whole else self.kept_weights.pick(name, values, rank)

    def _kind(self, name: str, is_grad: bool = False) -> str:
        """Which levels serve a parameter's values: kept weights have few near zero."""
        return "grad" if is_grad else "kept" if name in self.kept_weights else "weight"

    def _measure_weights(self, step: int, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the squared errors of the weights of ``advance`` at all bits, of all ranks."""
        for rank in range(self.world.num_ranks):
            own = rank % self.world.world_size
            for name, shard in shards[own].items():
                is_frozen = self.is_sent_once(shard, step)
                sent = self._sent(name, shard, own, is_whole=is_frozen)
                self._measure(name, sent, rank, is_grad=False, is_frozen=is_frozen)

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
        # What is sent once keeps the uniform grid: levels may be learned anew.
        levels = None if is_frozen else self._levels.of((name, self._kind(name, is_grad), bits))
        return self.codec.cross(name, values, key, bits, is_grad=is_grad, levels=levels)

    def _warm(self, bits: int, step: int | None) -> int:
        return max(bits, self.config.least_warmup_bits) if self._is_warm_up(step) else bits

    def _is_warm_up(self, step: int | None) -> bool:
        return step is not None and step < self.config.warmup_steps


def _bits(name: str, parameter: Tensor, config: QSDPConfig, is_embedding: bool) -> tuple[int, int]:
    """Weight and gradient bits after the warm-up; 32 is raw."""
    if not parameter.is_floating_point():
        return 32, 32
    if parameter.dim() < 2 and config.bits_by_policy(name) is None:
        return 32, 32
    return config.bits_of(name, is_embedding)
