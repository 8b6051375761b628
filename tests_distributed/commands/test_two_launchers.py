"""A cluster in small: two torchruns on one machine that meet by c10d rendezvous."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests_distributed.support.jobs import Jobs, read_metrics
from tests_distributed.support.launching import SMALL, TEXT, start

QUANTIZED = ["--qsdp-bits", "8"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def flags(tmp_path: Path, wire: list[str]) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = ["--out", str(tmp_path / "out")]
    return ["--data", str(text), *out, *SMALL, "--steps", "3", "--one-shot", "0.5", "--cram", *wire]


def check(out: Path, sizes: tuple[int, int]) -> None:
    """What nodes of these sizes leave in the folder of results."""
    assert json.loads((out / "summary.json").read_text())["world_size"] == sum(sizes)
    lines = read_metrics(out)
    assert len(lines) == 3
    for line in lines:
        assert 0 < line["gather_inter_node_bytes"] < line["gather_bytes"]
        if sizes == (2, 1):
            # A ring over both nodes leaves each of them once: two of the three ranks send out all.
            whole = 3 * line["gather_bytes"] / line["gather_inter_node_bytes"]
            assert whole == pytest.approx(3 * 3 / 2)


def test_two_launchers_train_one_model(tmp_path: Path) -> None:
    sizes = (2, 1)
    launcher = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", tmp_path.name)
    launcher += ("--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost")
    own = flags(tmp_path, QUANTIZED)
    jobs = [start(*own, launcher=launcher, num_ranks=size) for size in sizes]
    try:
        printed = [job.succeed() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert sum("3 ranks" in text for text in printed) == 1
    check(tmp_path / "out", sizes)
    # Here alone the end of a run is whole, as in no test that runs it on a pool.
    assert len(json.loads((tmp_path / "out/summary.json").read_text())["sample"]) > 200


@pytest.mark.parametrize(("sizes", "wire"), [((2, 2), QUANTIZED), ((2, 1), [])])
def test_ranks_of_two_nodes_train_one_model(
    run_jobs: Jobs, tmp_path: Path, sizes: tuple[int, int], wire: list[str]
) -> None:
    printed = run_jobs.succeed(sizes, flags(tmp_path, wire))
    assert printed.count(f"{sum(sizes)} ranks") == 1
    check(tmp_path / "out", sizes)
