"""The kept grids of a checkpoint, which a resumed run goes on with where they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qsdp
from qsdp import checkpoint
from qsdp.common.user_errors import counted
from qsdp.train.world import World


def take_grids(handle: qsdp.Handle, source: Path, meta: dict[str, Any], world: World) -> str | None:
    """Go on with the grids of the checkpoint ``source``, whose files have been verified.

    Weights, optimizer and the handle's state are loaded. Returns why all grids are drawn anew, in
    words; None where they are not, or there are none to keep. A collective.
    """
    layout = handle.state_dict()["grids"]
    if not layout:
        return None
    if _layout_of(meta) != layout:
        return _why(meta, world)
    grids = handle.grids()
    world.all_alike(lambda: checkpoint.load_tensors(source, grids, is_checked=True))
    world.all_alike(lambda: handle.load_grids(grids))
    return None


def _layout_of(meta: dict[str, Any]) -> str:
    """What the state in a checkpoint says of how kept rows were laid out; "" where none were."""
    return str((meta["wire"] or {}).get("grids", ""))


def _why(meta: dict[str, Any], world: World) -> str:
    """Why a checkpoint's grids cannot serve here."""
    if meta["world_size"] != world.size:
        ranks = counted(meta["world_size"], "rank")
        return f"the checkpoint is of {ranks}, not {world.size}"
    if _layout_of(meta):
        return "the checkpoint is of other bits, buckets, roundings or masks"
    before = meta["config"].get("qsdp_gather")
    if meta["wire"] is not None and before == "delta":
        return "the checkpoint is of an older version, which kept none"
    return "the run before did not gather changes"
