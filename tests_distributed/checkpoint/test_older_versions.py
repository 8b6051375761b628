"""What an older version wrote is read, and its runs go on: see older/README.md."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from qsdp.models.gpt2.model import GPT
from qsdp.models.gpt2.presets import PRESETS
from qsdp.train.trained_model import open_trained_model
from tests_distributed.support import jobs
from tests_distributed.support.jobs import Jobs, read_metrics
from tests_distributed.support.pool import meets_by_itself

OLDER = Path(__file__).parent / "older"
TINY = {"num_layers": 1, "num_heads": 2, "width": 16, "context": 16, "bias": False}
STEP = 3  # of the checkpoints
MIDDLE = f"checkpoints/step-{STEP:08d}"
LOGGED = 5  # steps that a run had logged when it was killed
STEPS = 8
FLAGS = {
    # As they were given: flags are read after an update too.
    "acdc": [
        *("--model", "tiny", "--seq-len", "16", "--batch-size", "2", "--steps", "8"),
        *("--warmup-steps", "2", "--lr", "1e-2", "--eval-every", "3", "--eval-batches", "2"),
        *("--save-every", "3", "--keep", "3", "--one-shot", "0.5,2:4"),
        *("--data", "text.txt", "--out", "acdc", "--qsdp-bits", "8", "--qsdp-budget", "6.5"),
        *("--acdc", "--acdc-target", "2:4", "--acdc-warmup", "2", "--acdc-phase", "2"),
        *("--acdc-last-dense", "2", "--acdc-last-sparse", "2"),
    ],
    "gmp": ["--config", "gmp/config.toml"],
    "cram": ["--config", "cram/config.toml"],
}

# Processors, and versions of torch, add up matrix products in other orders. With other vector
# instructions than those that wrote the data the numbers below moved by less than 1e-6 of
# themselves; without what the wire had learned, or with other moments, they move by more than this.
CLOSE = 1e-4
# Bytes depend on how many weights each rank keeps. After the checkpoint GMP's masks stay as they
# were, and those of the others keep as many in every row (N:M): no last bit can change their count.
EXACT = ("step", "tokens", "pruned", "skipped_steps")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder in which commands are called: to the older version too all paths were relative."""
    shutil.copytree(OLDER, tmp_path, dirs_exist_ok=True)
    for name in FLAGS:
        with tarfile.open(tmp_path / name / "checkpoint.tar.gz") as archive:
            archive.extractall(tmp_path / name, filter="data")
    return tmp_path


_run = jobs._run  # before a test puts the following in its place


@meets_by_itself
def _run_small(store: str, rank: int, size: int, work: Any) -> list[object]:
    # On CPUs, whatever there is: a run goes on where it was.
    no_gpu = mock.patch.object(torch.cuda, "device_count", return_value=0)
    with mock.patch.dict(PRESETS, tiny=TINY), no_gpu:
        return _run(store, rank, size, work)


@pytest.mark.parametrize("name", FLAGS)
def test_a_run_goes_on_from_the_middle_to_the_same_end(
    run_jobs: Jobs, home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = home / name
    expected, summary = read_metrics(out), json.loads((out / "summary.json").read_text())
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:LOGGED]))
    (out / "summary.json").unlink()
    monkeypatch.setattr(jobs, "_run", _run_small)
    [ends] = run_jobs.ends((2,), FLAGS[name], homes=[home, home])
    assert [end.status for end in ends] == [0, 0], ends[0].complaint
    assert f"Going on from {name}/{MIDDLE}" in ends[0].printed

    assert (out / "metrics.jsonl").read_text().splitlines(keepends=True)[:STEP] == lines[:STEP]
    found = read_metrics(out)
    assert len(found) == len(expected) == STEPS
    for line, then in zip(found[STEP:], expected[STEP:], strict=True):
        for key in then:
            if key in EXACT or "bytes" in key:
                assert line[key] == then[key], (then["step"], key)
            elif "loss" in key or key in ("lr", "grad_norm"):
                assert line[key] == pytest.approx(then[key], rel=CLOSE), (then["step"], key)
    ended = json.loads((out / "summary.json").read_text())
    for key in ("val_loss", "val_loss_quantized", "one_shot"):
        assert ended[key] == pytest.approx(summary[key], rel=CLOSE), key
    if name == "acdc":
        twin = "dense_twin_val_loss"
        assert ended[twin] == pytest.approx(summary[twin], rel=CLOSE)
    assert ended["sparsity"] == pytest.approx(summary["sparsity"], rel=1e-3)


@pytest.fixture
def _world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_world_of_one")
def test_weights_are_read_bit_for_bit(home: Path) -> None:
    places = {name: home / name / MIDDLE for name in FLAGS} | {"export": home / "export"}
    sums = json.loads((home / "weights.json").read_text())
    assert sums.keys() == places.keys()
    for name, path in places.items():
        source = open_trained_model(path)
        model = GPT(source.size)
        source.load(model)
        found = {
            key: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
            for key, parameter in model.named_parameters()
        }
        assert found == sums[name], name
        assert source.step == STEP


def test_what_was_evaluated_is_found_again(run_jobs: Jobs, home: Path) -> None:
    sources = {"checkpoint": f"cram/{MIDDLE}", "export": "export"}
    commands = [["evaluate", path, "--out", f"again/{name}"] for name, path in sources.items()]
    for [end] in run_jobs.ends((1,), *commands, homes=[home]):
        assert end.status == 0, end.complaint
    for name in sources:
        then = json.loads((home / "said" / f"{name}.json").read_text())
        now = json.loads((home / "again" / name / "evaluation.json").read_text())
        for key in ("compressed_to", "step", "data", "split", "sequences", "tokens"):
            assert now[key] == then[key], (name, key)
        assert len(then["results"]) == (8 if name == "checkpoint" else 1)
        for row, before in zip(now["results"], then["results"], strict=True):
            assert (row["target"], row["zeros"]) == (before["target"], before["zeros"]), name
            assert row["loss"] == pytest.approx(before["loss"], rel=CLOSE), (name, row["target"])
