"""Kept grids as DTensors by name, which checkpoints keep: given, and looked at when they are back.

A rank has the grids of its own shards, of as many buckets as the largest shard of the parameter
has: so they are cut as the parameter is, however many values each rank has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from reprlib import repr as shown
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from qsdp.comm.grid_exchange import kept_buckets
from qsdp.comm.group_plan import Plan
from qsdp.common.user_errors import names_for_user
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.ops.reference.kept_grids import KeptGrids

_PARTS = {"min": torch.float32, "scale": torch.float32, "epoch": torch.int32}
"""What ``KeptGrids`` holds, in its order: how the names of tensors end, and their dtypes."""
_ADVICE = "give the tensors of handle.grids(), or a checkpoint's that were read into them"


Own = Mapping[int, KeptGrids]
"""This rank's grids of a group, by place."""
Kept = Sequence[tuple[Plan, ParameterGroup]]
"""The groups whose codes are kept, in the order of their indices: all of a handle, or none."""


class _Coded(NamedTuple):
    """A coded parameter of a group of several ranks."""

    plan: Plan
    place: int
    """Its place in the group."""
    num_buckets: int
    """Those of the largest shard."""
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    """How its grids are cut: along dim 0 wherever the parameter is."""
    device: torch.device

    @property
    def name(self) -> str:
        return self.plan.names[self.place]


def _coded(kept: Kept) -> Iterator[_Coded]:
    """All parameters that have grids."""
    for plan, group in kept:
        parameters = group.sharded_parameters()
        for place, num_buckets in kept_buckets(plan).items():
            parameter = parameters[place]
            assert isinstance(parameter, DTensor)
            placements = (Shard(0) if p.is_shard() else Replicate() for p in parameter.placements)
            mesh, device = parameter.device_mesh, parameter.device
            yield _Coded(plan, place, num_buckets, mesh, tuple(placements), device)


def rows_hash(kept: Kept) -> str:
    """A text that says how kept rows are laid out, the same on all ranks; "" where there are none.

    Of masks it says which parameters have some: ranks with experts of their own keep other values.
    """
    described = [
        (
            plan.names,
            plan.world_size,
            [segment.definition for segment in plan.kept_rows().segments],
            sorted(plan.num_kept),
        )
        for plan, _ in kept
        if kept_buckets(plan)
    ]
    return blake2b(repr(described).encode(), digest_size=8).hexdigest() if described else ""


def grid_tensors(kept: Kept, own: Sequence[Own]) -> dict[str, Tensor]:
    """The kept grids of all coded parameters, by name, of this rank's ``own`` by group."""
    found: dict[str, Tensor] = {}
    for coded in _coded(kept):
        for part, values in zip(_PARTS, own[coded.plan.index][coded.place], strict=True):
            found[f"{coded.name}.{part}"] = DTensor.from_local(
                values, coded.mesh, coded.placements, run_check=False
            )
    return found


def checked_grids(grids: Mapping[str, Tensor], kept: Kept, step: int) -> list[Own]:
    """What this rank has of ``grids``, which ``grid_tensors`` gave, by group: nothing of none.

    Raises ValueError for other tensors than those, and for grids that were drawn after ``step`` of
    the clock.
    """
    found: list[dict[int, KeptGrids]] = [{} for _ in kept]
    if not isinstance(grids, Mapping):
        raise ValueError(f"grids is {shown(grids)}: give the dict that handle.grids() returns.")
    if not grids:
        return [*found]
    coded = [*_coded(kept)]
    expected = {f"{each.name}.{part}" for each in coded for part in _PARTS}
    if not expected:
        raise ValueError(
            f"grids are given ({names_for_user(list(map(str, grids)))}), but no codes are "
            "kept here: give none, or install with gather='delta' on several ranks."
        )
    if missing := sorted(expected - grids.keys()):
        raise ValueError(f"the grids lack {names_for_user(missing)}: {_ADVICE}.")
    if odd := [str(name) for name in grids if name not in expected]:
        raise ValueError(
            f"the grids hold {names_for_user(odd)}, which no parameter has: {_ADVICE}."
        )
    for each in coded:
        names = [f"{each.name}.{part}" for part in _PARTS]
        own = KeptGrids(*(_own_part(each, name, grids[name]) for name in names))
        if own.scale.isinf().any():
            raise ValueError(f"{names[1]} holds an inf, which no grid has: {_ADVICE}.")
        first, last = (int(steps) for steps in own.epoch.aminmax())
        if not 0 <= first <= last <= step:
            odd_step = first if first < 0 else last
            raise ValueError(
                f"{names[-1]} holds step {odd_step}, but the clock is at step {step}: load the "
                "handle.state_dict() that was saved with the grids before them."
            )
        found[each.plan.index][each.place] = own
    return [*found]


def _own_part(coded: _Coded, name: str, tensor: object) -> Tensor:
    """This rank's part of the tensor ``name`` of grids, if it is as ``grid_tensors`` gives it."""
    dtype = _PARTS[name.rpartition(".")[2]]
    if isinstance(tensor, DTensor):
        own = tensor.to_local().detach()
        found = tensor.device_mesh, tuple(tensor.placements), own.dtype, tuple(own.shape)
        if found == (coded.mesh, coded.placements, dtype, (coded.num_buckets,)):
            return own.to(coded.device)
    shape = tuple(getattr(tensor, "shape", ()))
    raise ValueError(
        f"{name} is {getattr(tensor, 'dtype', type(tensor).__name__)} of shape {shape}, but "
        f"{dtype} with {coded.num_buckets} values on each rank, cut as its parameter is, is kept "
        f"here: {_ADVICE}."
    )
