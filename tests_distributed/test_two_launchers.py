"""A cluster in small: two torchruns on one machine that meet by c10d rendezvous."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests_distributed.launching import SMALL, TEXT, start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("sizes", "wire"),
    [((2, 2), ["--qsdp-bits", "8"]), ((2, 1), ["--qsdp-bits", "8"]), ((2, 1), [])],
)
def test_two_launchers_train_one_model(
    tmp_path: Path, sizes: tuple[int, int], wire: list[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "out"
    launcher = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", tmp_path.name)
    launcher += ("--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost")
    flags = ["--data", str(text), "--out", str(out), *SMALL, "--steps", "3", "--cram", *wire]
    jobs = [start(*flags, launcher=launcher, num_ranks=size) for size in sizes]
    try:
        printed = [job.succeed() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    ranks = sum(sizes)
    assert sum(f"{ranks} ranks" in text for text in printed) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["world_size"] == ranks
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines if sizes == (2, 1) else ():
        # A ring over both nodes leaves each of them once: two of the three ranks send out all.
        whole = 3 * line["gather_bytes"] / line["gather_inter_node_bytes"]
        assert whole == pytest.approx(3 * 3 / 2)
