"""Ranks that load an export verify each file once, between them, and agree on what is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from qsdp.checkpoint import verifying
from qsdp.models.gpt2.model import GPT
from qsdp.train.trained_model import open_trained_model
from tests.support.exports import small_export
from tests.support.small_gpt import SIZE
from tests_distributed.support.helpers import shard
from tests_distributed.support.running import Run


def _load(folder: str, damaged: str) -> tuple[list[str], str, list[str]]:
    """The files that this rank verified when all were whole; then what was said, and read."""
    source, verified = open_trained_model(Path(folder)), list[str]()
    crc32_of_file = verifying.crc32_of_file

    def noted(path: Path) -> str:
        verified.append(path.name)
        return crc32_of_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifying, "crc32_of_file", noted)
        source.load(shard(GPT(SIZE)))
    dist.barrier()
    path = Path(folder) / damaged
    if dist.get_rank() == 0:
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    read: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qsdp.train.trained_model.load_export", lambda *_, **__: read.append("read"))
        with pytest.raises(ValueError, match="is damaged") as error:
            source.load(shard(GPT(SIZE)))
    return verified, str(error.value), read


def _make(folder: Path) -> Path:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return small_export(folder, file_bytes=8192)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("damaged", ["masks.safetensors", "model.safetensors.index.json"])
def test_all_ranks_refuse_what_one_of_them_found(run: Run, tmp_path: Path, damaged: str) -> None:
    export = _make(tmp_path)
    files = sorted(path.name for path in export.iterdir() if path.name != "compression.json")
    found = run(3, _load, str(export), damaged)
    assert sorted(name for verified, _, _ in found for name in verified) == files
    assert len({said for _, said, _ in found}) == 1
    assert f"{damaged} is damaged" in found[0][1]
    assert not any(read for _, _, read in found)
