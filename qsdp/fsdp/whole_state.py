"""All that a resumed run needs of the wire, in one dictionary for other libraries' checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from qsdp.common.rank_agreement import warn
from qsdp.fsdp.handle import Handle


def whole_state(handle: Handle) -> dict[str, Any]:
    """The whole state of the wire: what ``handle.state_dict()`` and ``handle.grids()`` give.

    A collective, after which every rank has the same: plain values, and with ``gather="delta"``
    whole tensors on the CPU, 0.1 bytes a parameter. Of a run on as many ranks it brings back the
    very same bytes.

    Returns:
        A dictionary for ``torch.save`` and ``load_whole_state``.
    """
    state = handle.state_dict()
    grids = {name: _whole(values) for name, values in handle.grids().items()}
    return {"state": state, "grids": grids}


def load_whole_state(handle: Handle, state: dict[str, Any]) -> None:
    """Load what ``whole_state`` gave, when weights, optimizer and its masks are as they will be.

    A collective. Where grids are kept here, and those of the state are of another number of ranks,
    or of other bits, buckets, roundings or masks, a UserWarning says that all are drawn anew.

    Raises:
        ValueError: This is no such state; or as ``Handle.load_state_dict``. Nothing is loaded then.
    """
    if not isinstance(state, dict) or state.keys() != {"state", "grids"}:
        raise ValueError(
            f"the state of the wire is {type(state).__name__} without 'state' and 'grids': give "
            "what whole_state() has returned."
        )
    handle.load_state_dict(state["state"])
    layout = handle.state_dict()["grids"]
    if not layout:
        return
    if state["state"].get("grids") != layout:
        warn(
            "the kept grids of the checkpoint are of another number of ranks, or of other bits, "
            "buckets, roundings or masks: all are drawn anew."
        )
        return
    own = handle.grids()
    handle.load_grids({name: _cut(values, own[name]) for name, values in state["grids"].items()})


def _whole(values: Tensor) -> Tensor:
    assert isinstance(values, DTensor)
    return values.full_tensor().cpu()


def _cut(values: Tensor, like: Tensor) -> Tensor:
    """This rank's part of whole ``values``, which every rank has."""
    assert isinstance(like, DTensor)
    mesh, placements = like.device_mesh, like.placements
    with torch.no_grad():
        return distribute_tensor(values.to(like.device), mesh, placements, src_data_rank=None)
