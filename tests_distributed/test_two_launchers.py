"""A cluster in small: two torchruns on one machine that meet by c10d rendezvous."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from tests_distributed.launching import SMALL, TEXT, start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def test_two_launchers_train_one_model(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "out"
    launcher = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", tmp_path.name)
    launcher += ("--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost")
    flags = ["--data", str(text), "--out", str(out), *SMALL, "--steps", "3"]
    flags += ["--qsdp-bits", "8", "--cram"]
    jobs = [start(*flags, launcher=launcher) for _ in range(2)]
    try:
        printed = [job.succeed() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert sum("4 ranks" in text for text in printed) == 1
    assert json.loads((out / "summary.json").read_text())["world_size"] == 4
