"""The trainer with --qsdp-gather delta: what its metrics say beside validations."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qsdp.report.progress import RunProgress
from qsdp.train.config import TrainConfig
from qsdp.train.loop import train_step, validate_in_loop
from qsdp.train.setup import set_up
from qsdp.train.world import World
from tests_distributed.support.launching import TEXT
from tests_distributed.support.running import Run

STEPS = 4


def _lines(folder: Path, validates: bool) -> list[dict[str, Any]]:
    """The metrics of a few steps; a validation may come after each but the last."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, torch.device("cpu"), "gloo", init_device_mesh("cpu", (size,)))
    config = TrainConfig.of(
        data=str(folder / "text.txt"),
        out=str(folder / f"out{validates}"),
        qsdp_bits=4,
        qsdp_gather="delta",
        model="tiny",
        steps=9,
        seq_len=16,
        batch_size=2,
        eval_batches=2,
    )
    with ExitStack() as held:
        job = set_up(config, world, held)
        assert job is not None
        lines = []
        for step in range(STEPS):
            lines.append(train_step(job))
            if validates and step + 1 < STEPS:
                validate_in_loop(job, RunProgress(0, STEPS, is_shown=False), lines[-1])
    return lines


def test_a_validation_changes_neither_the_training_nor_what_is_said_of_its_bytes(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    plain, beside = (run(2, _lines, tmp_path, validates)[0] for validates in (False, True))
    assert [line["loss"] for line in plain] == [line["loss"] for line in beside]
    for name in ("changed_codes", "redrawn_buckets"):
        plain_total, total = (sum(line[name] for line in lines) for lines in (plain, beside))
        assert plain_total == total > 0
    assert plain[0]["redrawn_buckets"] > 100  # all of them
    assert all(line["changed_codes"] > 0 for line in plain[1:])
    # What a validation sends for the next step counts as this one's; then headers are left.
    headers = beside[-1]["gather_bytes"]
    assert 0 < headers < plain[-1]["gather_bytes"] / 5
    sent, with_headers = (sum(line["gather_bytes"] for line in each) for each in (plain, beside))
    assert with_headers == sent + (STEPS - 1) * headers
    for line in plain + beside:
        assert line["wire_bytes_sent"] == line["gather_bytes"] + line["reduce_bytes"]
