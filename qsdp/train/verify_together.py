"""Whether a checkpoint is damaged, as all ranks of a run find out together."""

from __future__ import annotations

from pathlib import Path

from qsdp import checkpoint
from qsdp.checkpoint import Damaged
from qsdp.train.world import World


def verify_together(path: Path, world: World) -> Damaged | None:
    """Verify a checkpoint, all ranks together. Returns what is damaged of it. A collective.

    Raises UserError, on every rank, if it cannot be read.
    """

    def check() -> Damaged | None:
        try:
            checkpoint.check(path)
        except Damaged as error:
            return error
        return None

    return world.all_alike(check)
