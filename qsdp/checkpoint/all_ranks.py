"""All ranks, which save, load and verify a checkpoint together."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from qsdp.common.rank_agreement import meet


def all_ranks() -> dist.ProcessGroup:
    """The process group of all ranks, which work on a checkpoint together.

    Raises RuntimeError if there is none.
    """
    if dist.group.WORLD is None:
        raise RuntimeError(
            "there is no process group of all ranks: call torch.distributed.init_process_group "
            "before checkpoints are saved or loaded, and end it after."
        )
    return dist.group.WORLD


def meet_all_ranks(call: str, *, has_news: bool = False, **facts: object) -> bool:
    """Meet all ranks at ``call``, a function of checkpoints, with the same facts: see ``meet``."""
    world = all_ranks()
    told = {name: _plain(value) for name, value in facts.items()}
    return meet(f"checkpoint.{call}", told, [world], has_news=has_news)


def _plain(value: object) -> object:
    """A fact that equals another rank's where it is the same; tuples are lists of names."""
    if isinstance(value, tuple):
        return value
    return str(value.resolve() if isinstance(value, Path) else value)
