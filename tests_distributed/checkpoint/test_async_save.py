"""Ranks save beside training as they do at once, and agree on what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from qsdp import ACDC, checkpoint
from qsdp.checkpoint import saving
from qsdp.methods.acdc.schedule import ACDCSchedule
from tests_distributed.support.helpers import Toy, make_batch, make_model, shard
from tests_distributed.support.running import Run


def _step(model: Toy, optimizer: ACDC, number: int) -> None:
    model(*make_batch(model, number)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _save(folder: str) -> list[str]:
    """What was said of failures; shards are uneven and empty, weights tied, and some pruned."""
    root, rank = Path(folder), dist.get_rank()
    model = shard(make_model(0, tied=True))
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = ACDCSchedule(steps=20, warmup=1, phase=3, last_dense=3, last_sparse=3)
    optimizer = ACDC(model, adamw, schedule=schedule, prunable=["blocks.*.up.weight"])
    for number in range(3):
        _step(model, optimizer, number)
    said: list[str] = []
    checkpoint.save(root / "now", 3, model, optimizer, {})
    with checkpoint.AsyncSaver() as saver:
        saver.save(root / "beside", 3, model, optimizer, {})
        for number in range(3, 5):  # its collectives and the saver's are at the same time
            _step(model, optimizer, number)
        path = saver.wait()
        assert path is not None
        for name in (root / "now").rglob("*.distcp"):
            assert name.read_bytes() == (path / name.name).read_bytes()

        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(saving, "sync", _fail)
            saver.save(root / "beside", 5, model, optimizer, {})
            with pytest.raises(RuntimeError) as error:
                saver.wait()
        said.append(str(error.value))

        saver.save(root / "beside", 5, model, optimizer, {})
        (writing,) = saver._last
        writing.thread.join()
        if rank == 1:  # of which no other rank knows
            writing.failure = RuntimeError("no memory")
        with pytest.raises(RuntimeError, match="no memory"):
            saver.wait()

    damaged = path / "__1_0.distcp"
    if rank == 0:
        damaged.write_bytes(damaged.read_bytes()[:-1])
    dist.barrier()
    with pytest.raises(checkpoint.Damaged) as damage:
        checkpoint.load(path, model, optimizer)
    said.append(str(damage.value))
    return said


def _fail(path: Path) -> None:
    raise OSError(f"no way to {path.name}")


def test_all_ranks_save_what_they_had_and_fail_alike(run: Run, tmp_path: Path) -> None:
    first, *others = run(4, _save, str(tmp_path))
    assert others == [first] * 3
    assert "cannot be read back (no way to __1_0.distcp)" in first[0]
    assert "__1_0.distcp is damaged (its checksum is not" in first[1]
    names = sorted(path.name for path in tmp_path.glob("*/*"))
    assert names == ["step-00000003", "step-00000003", "step-00000005"]
    files = {path.name for path in tmp_path.glob("beside/step-00000003/*.distcp")}
    assert len(files) == 4
