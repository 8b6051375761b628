"""The plan: which bytes of a group's flat buffers are which parameter's, and how each travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.codec.payload import Segment
from qsdp.codec.random_numbers import KeyStage
from qsdp.comm.bit_budget import Claim
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.learned_levels import LevelKind, levels_offset
from qsdp.comm.pruned_slices import PrunedSlices, SliceMasks
from qsdp.comm.topology import StageGroup
from qsdp.common.dtypes import CODEC_DTYPES, DType
from qsdp.common.rounding import Rounding
from qsdp.common.sharding import chunk
from qsdp.common.user_errors import group_for_user
from qsdp.config import QSDPConfig

_MOST_LAYOUTS = 32
"""The most layouts of a direction that are kept.
A step uses few of each: frozen or not, stages, replicas, what was agreed on.
"""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What a group's plan knows of one of its parameters."""

    name: str
    index: int
    """Place among all parameters of the model: a counter word of the random generator."""
    shape: torch.Size
    """The shape of the whole parameter."""
    dtype: torch.dtype
    """The dtype in the all-gather buffer."""
    shard_dim: int
    weight_bits: int
    """2 to 8: coded. 16: bf16. 32: the value as it is."""
    grad_bits: int
    keeps_bits: bool
    """Whether a budget leaves its bits as they are."""
    why: str
    """Why it travels so, for the report."""

    def shard_numel(self, rank: int, world_size: int) -> int:
        """Valid values of the rank's slice of the shard dimension."""
        rows = self.shape[self.shard_dim]
        _, mine = chunk(rows, rank, world_size)
        return mine * (self.shape.numel() // rows) if rows else 0

    def padded_numel(self, world_size: int) -> int:
        """Values that every rank's slice takes in a flat buffer: those of rank 0."""
        return self.shard_numel(0, world_size)


class Plan:
    """The plan of one group: how its parameters travel.

    ``stages`` says whom this rank exchanges with, innermost first ([Note: Stages]): flat until all
    ranks have agreed. ``has_sparse_grads`` says whether under a support only the gradients of kept
    weights travel.

    Args:
        parameters: In the order of FSDP2's flat buffer.
        index: The group's place in the model: a counter word of the random generator.
        group: The process group of the shard axis.
        config: Roundings and bucket sizes.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        index: int,
        group: dist.ProcessGroup,
        config: QSDPConfig,
    ) -> None:
        self.parameters = self._made_with = tuple(parameters)
        self.index = index
        self.group = group
        self.stages: tuple[StageGroup, ...] = (StageGroup(KeyStage.FLAT, group),)
        self.world_size = group.size()
        self.rank = group.rank()
        self.names = tuple(p.name for p in parameters)
        self.name = group_for_user(self.names)
        self._config = config
        self._support: Mapping[int, SliceMasks] = {}
        self.has_sparse_grads = True
        self._layouts: dict[tuple[object, ...], GroupLayout] = {}
        """The layouts that are kept, in the order of their last use."""

    @property
    def places(self) -> tuple[int, ...]:
        """The places of all parameters."""
        return tuple(range(len(self.parameters)))

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a rank's slice of FSDP2's flat buffer of weights."""
        return sum(p.padded_numel(self.world_size) * p.dtype.itemsize for p in self.parameters)

    def claims(self, *, is_grad: bool) -> list[tuple[Parameter, Claim]]:
        """What coded weights, or gradients, take of a budget."""
        found, is_allotted = [], self._config.budget_of(is_grad=is_grad) is not None
        for p in self.parameters:
            bits = p.grad_bits if is_grad else p.weight_bits
            if bits <= 8:
                padded = p.padded_numel(self.world_size)
                kept = bits if p.keeps_bits or not is_allotted else None
                found.append((p, Claim(p.shape.numel(), padded, self.world_size, kept)))
        return found

    def set_bits(self, bits: Mapping[str, tuple[int, int]]) -> None:
        """Give the parameters of these names other (weight, gradient) bits than they had at first.

        All others get theirs back.
        """
        self.parameters = tuple(
            replace(p, weight_bits=bits[p.name][0], grad_bits=bits[p.name][1], why="budget")
            if p.name in bits
            else p
            for p in self._made_with
        )
        self._layouts.clear()

    def set_support(self, masks: Mapping[int, SliceMasks], *, with_grads: bool = True) -> None:
        """Let only some weights of the parameters at these places not be zero: [Note: Support].

        ``with_grads``: nobody wants the gradients of the others either.
        """
        if masks or self._support:
            self._support, self.has_sparse_grads = masks, with_grads
            self._layouts = {k: each for k, each in self._layouts.items() if k[-1] == "dense"}

    @property
    def num_kept(self) -> dict[int, int]:
        """By place, the values that all ranks together keep of a parameter under the support."""
        return {place: sum(masks.counts) for place, masks in self._support.items()}

    def gather(
        self,
        places: tuple[int, ...],
        least_bits: int = 0,
        *,
        is_frozen: bool = False,
        is_dense: bool = False,
    ) -> GroupLayout:
        """The gather of the parameters at ``places``, with no fewer than ``least_bits``.

        Args:
            is_frozen: It is sent once, so whole, and on the uniform grid: levels may be learned
                anew.
            is_dense: It is sent whole, whatever the support.
        """
        masks = self._masks([] if is_frozen or is_dense else places)
        key = ("gather", places, least_bits, is_frozen, "sparse" if masks else "dense")
        if (layout := self._known(key)) is not None:
            return layout
        starts = self._starts()
        kept = [mask is not None for mask in masks] or [False] * len(places)
        segments = []
        for p, is_kept in zip((self.parameters[i] for i in places), kept, strict=True):
            kind = (
                LevelKind.FROZEN if is_frozen else LevelKind.KEPT if is_kept else LevelKind.WEIGHT
            )
            segments.append(self._segment(p, p.dtype, max(p.weight_bits, least_bits), kind))
        return self._keep(key, self._layout(segments, places, masks, [starts[i] for i in places]))

    def reduce(
        self,
        with_grad: tuple[int, ...],
        dtype: torch.dtype,
        least_bits: int = 0,
        is_local: bool = False,
    ) -> GroupLayout:
        """The reduce of the parameters at places ``with_grad``, in ``dtype``.

        ``is_local``: inside a node, where links are fast and more bits are sent.
        """
        masks = self._masks(with_grad if self.has_sparse_grads else [])
        key = ("reduce", with_grad, dtype, least_bits, is_local, "sparse" if masks else "dense")
        if (layout := self._known(key)) is not None:
            return layout
        segments = []
        for p in (self.parameters[i] for i in with_grad):
            bits, rotates_in = p.grad_bits, self.rotates_in(p, least_bits)
            if is_local and bits <= 8:
                bits = self._config.local_grad_bits or 8
            segment = self._segment(p, dtype, max(bits, least_bits), LevelKind.GRAD)
            segments.append(replace(segment, rotates_in=rotates_in))
        return self._keep(key, self._layout(segments, with_grad, masks))

    def rotates_in(self, parameter: Parameter, least_bits: int = 0) -> int:
        """In how large buckets a parameter's gradients are rotated, in all stages; 0: not at all.

        It follows from the bits outside of nodes, which are no fewer than ``least_bits``.
        """
        bits = max(parameter.grad_bits, least_bits)
        if not self._config.rotates(bits, keeps_bits=parameter.keeps_bits):
            return 0
        return self._config.bucket_of(bits, is_grad=True)

    def kept_rows(self) -> GroupLayout:
        """The rows of all ranks' codes that every rank keeps: [Note: Kept] in kept_codes.py."""
        masks = self._masks(self.places)
        key = "kept", "sparse" if masks else "dense"
        if (layout := self._known(key)) is not None:
            return layout
        segments = [
            self._segment(p, p.dtype, p.weight_bits, LevelKind.WEIGHT) for p in self.parameters
        ]
        segments = [replace(each, keeps_epochs=each.bits > 0) for each in segments]
        return self._keep(key, self._layout(segments, self.places, masks, self._starts()))

    def _starts(self) -> list[int]:
        """By place, where a parameter's values start in a rank's slice of the buffer of weights."""
        sizes = (p.padded_numel(self.world_size) * p.dtype.itemsize for p in self.parameters)
        *starts, _ = accumulate(sizes, initial=0)
        return starts

    def _known(self, key: tuple[object, ...]) -> GroupLayout | None:
        layout = self._layouts.pop(key, None)
        if layout is not None:
            self._layouts[key] = layout
        return layout

    def _keep(self, key: tuple[object, ...], layout: GroupLayout) -> GroupLayout:
        """Keep ``layout``, and of its direction those used last: sets may differ in every step."""
        self._layouts[key] = layout
        for old in [each for each in self._layouts if each[0] == key[0]][:-_MOST_LAYOUTS]:
            del self._layouts[old]
        return layout

    def _layout(
        self,
        segments: list[Segment],
        places: tuple[int, ...],
        masks: Sequence[SliceMasks | None],
        starts: Sequence[int] | None = None,
    ) -> GroupLayout:
        pruned = PrunedSlices(segments, starts, masks) if masks else None
        return GroupLayout(segments, self.index, self._numels[:, places], starts, pruned)

    @cached_property
    def _numels(self) -> Tensor:
        """int64 [ranks, parameters]: the codec's elements in each rank's slices."""
        ranks, parameters = range(self.world_size), self.parameters
        by_parameter = [
            [p.shard_numel(rank, self.world_size) * _units(p.dtype) for rank in ranks]
            for p in parameters
        ]
        return torch.tensor(by_parameter).T

    def _masks(self, places: Sequence[int]) -> list[SliceMasks | None]:
        """By place, the masks; an empty list where there are none."""
        if not any(place in self._support for place in places):
            return []
        return [self._support.get(place) for place in places]

    def _segment(
        self, parameter: Parameter, dtype: torch.dtype, bits: int, kind: LevelKind
    ) -> Segment:
        own = CODEC_DTYPES.get(dtype, DType.OPAQUE)
        narrow, is_grad = bits == 16 and own == DType.FP32, kind == LevelKind.GRAD
        return Segment(
            bits=bits if bits <= 8 else 0,
            dtype=own,
            wire=DType.BF16 if narrow else own,
            padded=parameter.padded_numel(self.world_size) * _units(dtype),
            parameter=parameter.index,
            bucket=self._config.bucket_of(bits, is_grad=is_grad),
            rounding=Rounding.of(self._config.rounding_of(bits, is_grad=is_grad)),
            levels=levels_offset(self._config, parameter.index, bits, kind),
        )


def _units(dtype: torch.dtype) -> int:
    """Elements of the codec per element: types that it does not know are counted in bytes."""
    return 1 if dtype in CODEC_DTYPES else dtype.itemsize
