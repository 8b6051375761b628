"""The payloads that a group keeps of its gathers, to decode them again."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from qsdp.comm.buffers import allocate_buffer
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.wire_state import Wire


class CacheablePayloads(NamedTuple):
    """What all ranks sent in one gather, as the weight cache may keep it to decode it again."""

    layout: GroupLayout
    buffer: Tensor
    """uint8 [ranks * payload bytes], in the order of ``gathered_ranks``."""
    step: int
    keys: Tensor
    """int64 [ranks], by rank."""
    written: torch.Event | None = None
    """When they were written. On a GPU they may be decoded on another stream than they came on."""


class Source(Enum):
    """Where a gather has weights from, as the weight cache says."""

    NOWHERE = auto()
    """There are none of this kind."""
    WIRE = auto()
    """All ranks send them."""
    CACHE = auto()
    """Their payloads are here: they are decoded again, and nothing is sent."""


class FoundWeights(NamedTuple):
    """What the weight cache finds of the trained or the frozen weights of a group."""

    source: Source
    places: tuple[int, ...] = ()
    payloads: CacheablePayloads | None = None
    """Those of the cache."""


class WeightCache:
    """The cache of the weights' payloads that one group keeps.

    With ``gather="once"`` those of a training forward, until the backward pass decodes them again;
    and those of frozen weights, until whoever knows that these have changed says so.

    Args:
        plan: How the group travels.
        wire: What the group shares with the others.
    """

    def __init__(self, plan: Plan, wire: Wire) -> None:
        self._plan, self._wire = plan, wire
        self._trained: tuple[tuple[int, ...], CacheablePayloads] | None = None
        self._frozen: CacheablePayloads | None = None
        self._memory: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that its buffers take on this rank."""
        frozen = None if self._frozen is None else self._frozen.buffer
        return sum(buffer.numel() for buffer in (self._memory, frozen) if buffer is not None)

    @property
    def has_frozen(self) -> bool:
        """Whether payloads of frozen weights are kept."""
        return self._frozen is not None

    def forget_frozen(self) -> None:
        """Let the next gather send the frozen weights again."""
        self._frozen = None

    def free(self) -> None:
        """Free all that is kept: nothing will ask for it soon."""
        self._trained = self._frozen = self._memory = None

    def forget_trained(self) -> None:
        """Let no backward pass decode what an earlier forward pass has kept."""
        self._trained = None

    def find(self, trains: Sequence[bool]) -> tuple[FoundWeights, FoundWeights]:
        """Where a gather has the trained and the frozen weights from.

        What was kept of trained ones is the caller's from now on, and serves once.

        ``trains`` says by place which are trained. All weights count as trained where nothing is
        kept: in an exact step, and with ``gather="twice"``. To a backward pass those do that did
        when payloads were kept: it has the weights of its forward pass.
        """
        plan, wire = self._plan, self._wire
        kept, self._trained = self._trained, None
        if wire.is_exact or wire.gathers(wire.clock.step) == "twice":
            return FoundWeights(Source.WIRE, plan.places), FoundWeights(Source.NOWHERE)
        places = tuple(i for i in plan.places if trains[i])
        if kept is not None:
            places = kept[0]
            trained = FoundWeights(Source.CACHE, *kept)
        else:
            trained = FoundWeights(Source.WIRE if places else Source.NOWHERE, places)
        return trained, self._find_frozen(tuple(i for i in plan.places if i not in places))

    def _find_frozen(self, places: tuple[int, ...]) -> FoundWeights:
        if not places:
            self._frozen = None
            return FoundWeights(Source.NOWHERE)
        layout = self._plan.gather(places, is_frozen=True)
        if self._frozen is None or self._frozen.layout is not layout:
            return FoundWeights(Source.WIRE, places)
        return FoundWeights(Source.CACHE, places, self._frozen)

    def room(self, num_bytes: int, device: torch.device) -> Tensor:
        """uint8 [num_bytes] for trained payloads that are to be kept; those of before are lost."""
        if self._memory is None or self._memory.numel() < num_bytes:
            self._memory = allocate_buffer(num_bytes, device)
        return self._memory[:num_bytes]

    def keep_trained(self, places: tuple[int, ...], payloads: CacheablePayloads) -> None:
        """Keep payloads of the trained weights at ``places`` until the backward pass."""
        self._trained = places, payloads

    def keep_frozen(self, payloads: CacheablePayloads) -> None:
        """Keep payloads of the frozen weights until they change."""
        self._frozen = payloads
