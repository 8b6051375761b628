"""A checkpoint that would keep one of two experts is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from qsdp.checkpoint import latest, save
from tests_distributed.support.expert_methods import NAMES
from tests_distributed.support.experts import LAYOUTS, Layout
from tests_distributed.support.helpers import all_ranks
from tests_distributed.support.running import Run, selection


def _saved(layout: Layout, with_optimizer: bool, folder: Path) -> tuple[str, Path | None]:
    model = layout.shard()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if with_optimizer else None
    try:
        save(folder, 1, model, optimizer, {})
    except (ValueError, RuntimeError) as error:
        return str(error), latest(folder)
    return "saved", latest(folder)


@selection(
    "layout, with_optimizer",
    [
        *(("two of two", True), ("replicas", False)),
        *(("a rank each", False), ("one and two", True)),
    ],
    NAMES,
    (False, True),
)
def test_a_checkpoint_that_would_keep_one_of_two_experts_is_refused_by_name(
    run: Run, tmp_path: Path, layout: str, with_optimizer: bool
) -> None:
    chosen = LAYOUTS[layout]
    results = run(chosen.ranks, _saved, chosen, with_optimizer, tmp_path)
    for message, checkpoint in results:
        assert message == results[0][0]
        assert "free some space" not in message
        assert "\n" not in message
        assert re.search(r"blocks\.\d\.expert\.(up|down)\.(weight|bias)", message), message
        assert checkpoint is None


class _Student(nn.Module):
    """Beside it a frozen teacher, and a module that the first two ranks alone have."""

    def __init__(self, rank: int, teacher: float) -> None:
        super().__init__()
        self.student = nn.Linear(6, 6)
        self.teacher = nn.Linear(6, 6).requires_grad_(False)
        self.teacher.weight.data.mul_(teacher)
        if rank < 2:
            self.extra = nn.Linear(6, 6)


def _save_beside_a_teacher(folder: Path, differs: str) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "gpu"))
    rank = dist.get_rank()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Student(rank, 1.0 + (differs == "teacher.weight" and rank // 2))
    for name, module in model.named_children():
        fully_shard(module, mesh=all_ranks() if name == "student" else mesh["gpu"])
    mine = torch.full((2,), float(differs == "tensors.grid" and rank // 2))
    tensors = {"grid": DTensor.from_local(mine, mesh["gpu"], [Shard(0)])}
    try:
        save(folder, 1, model, None, {}, tensors=tensors)
    except ValueError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("differs", ["", "teacher.weight", "tensors.grid"])
def test_copies_on_submeshes_are_saved_and_different_ones_are_not(
    run: Run, tmp_path: Path, differs: str
) -> None:
    for text in run(4, _save_beside_a_teacher, tmp_path, differs):
        assert text.startswith(f"{differs} is sharded over some of" if differs else "saved")


def _save_after_a_validation(folder: Path) -> str:
    model = LAYOUTS["a rank each"].shard()
    with torch.no_grad():  # the root, which holds all that is shared, stays gathered
        model(torch.randn(4, 6))
    try:
        save(folder, 1, model, None, {})
    except ValueError as error:
        return str(error)
    return "saved"


def test_a_checkpoint_after_a_validation_is_refused_too(run: Run, tmp_path: Path) -> None:
    for text in run(2, _save_after_a_validation, tmp_path):
        assert "have one of their own under its name" in text
