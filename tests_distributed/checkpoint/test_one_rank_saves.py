"""One rank differs in what it saves or loads: all ranks raise one sentence, and none hangs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qsdp.checkpoint import load, load_tensors, save
from tests_distributed.support.one_rank import (
    FORWARD,
    Act,
    Point,
    Stage,
    apart,
    differs,
    forward,
    made,
    say,
)
from tests_distributed.support.running import Run, selection


def _save(step: int, has_optimizer: bool = True, folder: str = "", **options: Any) -> Act:
    def act(stage: Stage) -> None:
        optimizer = stage.optimizer if has_optimizer else None
        save(stage.folder / folder, step, stage.model, optimizer, {}, **options)

    return act


def _load_step(step: int) -> Act:
    return lambda stage: load(stage.folder / f"step-{step:08d}", stage.model, stage.optimizer)


def _load_tensors(*names: str) -> Act:
    tensors = {name: torch.zeros(2) for name in names}
    return lambda stage: load_tensors(stage.folder / "step-00000002", tensors)


GRIDS = {"grid": torch.ones(2), "room": torch.ones(2)}
CHECKPOINTS = {
    "step": (_save(4), _save(3), differs("checkpoint.save", "step", "4", "3")),
    "folder": (_save(3, folder="b"), _save(3), differs("checkpoint.save", "folder", r".*b", ".*")),
    "keep": (_save(3, keep=9), _save(3), differs("checkpoint.save", "keep", "9", "2")),
    "optimizer": (
        _save(3, False),
        _save(3),
        differs("checkpoint.save", "optimizer", "False", "True"),
    ),
    "loaded step": (
        _load_step(1),
        _load_step(2),
        differs("checkpoint.load", "folder", ".*1", ".*2"),
    ),
    "missing": (_load_step(9), _load_step(2), differs("checkpoint.load", "folder", ".*9", ".*2")),
    "loaded while saved": (_load_step(1), _save(3), apart("checkpoint.load", "checkpoint.save")),
    "tensors": (
        _save(3, tensors={"grid": torch.ones(2)}),
        _save(3, tensors=GRIDS),
        differs("checkpoint.save", "tensors", "1 others", "room"),
    ),
    "no tensors": (
        _save(3),
        _save(3, tensors=GRIDS),
        differs("checkpoint.save", "tensors", "none", "grid and room"),
    ),
    "loaded tensors": (
        _load_tensors("grid", "room"),
        _load_tensors("grid"),
        differs("checkpoint.load_tensors", "tensors", "room", "1 others"),
    ),
    "no tensors loaded": (
        forward,
        _load_tensors("grid"),
        apart(FORWARD, "checkpoint.load_tensors"),
    ),
    "not saved": (forward, _save(3), apart(FORWARD, "checkpoint.save")),
}


def go_through_checkpoints(folder: Path, odd: int) -> dict[str, str]:
    """What this rank says at each point."""
    odd %= dist.get_world_size()

    def before(stage: Stage) -> None:
        made("CrAM")(stage)
        stage.folder = folder
        if not folder.exists():
            dist.barrier()
            _save(1)(stage)
            _save(2, tensors=GRIDS)(stage)

    return {
        name: say(Point(there=there, elsewhere=elsewhere, says=says, before=before), odd)
        for name, (there, elsewhere, says) in CHECKPOINTS.items()
    }


@selection("ranks,odd", [(2, -1), (3, 0)], [2, 3], [0, -1])
def test_when_one_rank_differs_no_checkpoint_is_touched(
    run: Run, tmp_path: Path, ranks: int, odd: int
) -> None:
    everyone = run(ranks, go_through_checkpoints, tmp_path / "checkpoints", odd)
    for name, (*_, says) in CHECKPOINTS.items():
        for rank, said in enumerate(each[name] for each in everyone):
            assert re.fullmatch(rf"{says(rank, odd % ranks)}\.", said), f"{name}: {said}"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
