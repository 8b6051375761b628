"""A checkpoint that may not be loaded, or could not be, is refused by all ranks in one sentence."""

from __future__ import annotations

import os
import pickle
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from qsdp import checkpoint
from qsdp.checkpoint.meta_json import sealed
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.running import Run


class Evil:
    def __init__(self, canary: str) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._canary}",)


def _refusals(folder: str) -> tuple[str, str, str]:
    """Of a state that one rank alone cannot save, a table and an entry that call."""
    model = shard(make_model(0))
    optimizer = torch.optim.AdamW(model.parameters())
    model(*make_batch(model, 0)).backward()
    optimizer.step()
    said = []

    def refuse(call: Any) -> None:
        try:
            call()
        except ValueError as error:
            said.append(str(error))

    optimizer.param_groups[0]["extra"] = SimpleNamespace() if dist.get_rank() else 1
    refuse(lambda: checkpoint.save(Path(folder), 1, model, optimizer, {}))
    optimizer.param_groups[0]["extra"] = 1
    path = checkpoint.save(Path(folder), 1, model, optimizer, {})
    for place in ("table", "entry"):
        if dist.get_rank() == 0:
            _trick(path, place)
        dist.barrier()
        refuse(lambda: checkpoint.load(path, model, optimizer))
    saving, table, entry = said
    return saving, table, entry


def _trick(path: Path, place: str) -> None:
    table, evil = path / ".metadata", pickle.dumps(Evil(str(path / "canary")), protocol=2)
    written = table.read_bytes()
    if place == "table":
        table.write_bytes(evil)
    else:
        (path / "table").replace(table)
        metadata = pickle.loads(table.read_bytes())
        place_of = {index.fqn: info for index, info in metadata.storage_data.items()}
        info = place_of["optimizer.param_groups.0.lr"]
        file = path / info.relative_path
        data = file.read_bytes()
        padded = evil.ljust(info.length, b".")
        file.write_bytes(data[: info.offset] + padded + data[info.offset + info.length :])
    if place == "table":
        (path / "table").write_bytes(written)
    meta = checkpoint.read_meta(path)
    for name in meta["checksums"]:
        meta["checksums"][name] = f"crc32:{zlib.crc32((path / name).read_bytes()):08x}"
    (path / "meta.json").write_text(sealed(meta))


def test_all_ranks_refuse_alike_and_nothing_runs(run: Run, tmp_path: Path) -> None:
    first, second = run(2, _refusals, str(tmp_path))
    assert first == second
    saving, table, entry = first
    assert "param_groups.0.extra is or holds an object (types.SimpleNamespace)" in saving
    for said in (table, entry):
        assert "posix.system" in said
        assert "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert not (tmp_path / "step-00000001" / "canary").exists()
