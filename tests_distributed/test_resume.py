"""A run that was killed goes on as if it had not been, bit for bit."""

from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from qsdp import checkpoint
from qsdp.train.cli import main
from tests_distributed.launching import SMALL, TEXT, Job, start

STEPS = 9
FLAGS = [*SMALL, "--steps", str(STEPS), "--save-every", "2", "--eval-every", "3", "--grad-accum"]
FLAGS += ["2", "--qsdp-bits", "4", "--cram", "--lr", "1e-2", "--warmup-steps", "2"]
# Every step of the keys' clock, two an optimizer step, depends on what was learned before it.
FLAGS += ["--qsdp-levels", "learned", "--qsdp-level-steps", ",".join(map(str, range(1, 18)))]
FLAGS += ["--qsdp-gather", "once", "--qsdp-budget", "4.5", "--qsdp-errors"]


def tensors(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer in a checkpoint, whole."""
    dcp_to_torch_save(folder, scratch)
    found: dict[str, torch.Tensor] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}/{key}", inner)

    collect("", torch.load(scratch))
    assert len(found) > 20
    return found


def test_killed_runs_end_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def flags(name: str) -> list[str]:
        return ["--data", str(text), "--out", str(tmp_path / name), *FLAGS]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start(*flags("whole")).succeed()

    metrics, checkpoints = killed / "metrics.jsonl", killed / "checkpoints"
    last_step = random.randint(2, STEPS - 4)

    def is_past_the_step() -> bool:
        # By then there is a checkpoint of step 2.
        is_saved = (checkpoints / "step-00000002").exists() or last_step > 2
        return is_saved and metrics.exists() and metrics.read_text().count("\n") >= last_step

    job = start(*flags("killed"))
    assert job.kill_when(is_past_the_step), job.output
    started = time.time()

    def is_writing() -> bool:
        # Not what the first crash may have left.
        with contextlib.suppress(FileNotFoundError):
            return any(p.stat().st_mtime > started for p in checkpoints.glob("tmp-step-*"))
        return False

    job = start(*flags("killed"))
    assert job.kill_when(is_writing), job.output
    assert "Going on from" in job.output
    assert not (killed / "summary.json").exists()
    assert "Going on from" in start(*flags("killed")).succeed()

    last = f"checkpoints/step-{STEPS:08d}"
    expected = tensors(whole / last, tmp_path / "whole.pt")
    found = tensors(killed / last, tmp_path / "killed.pt")
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == [], f"killed after {last_step} steps"
    losses = [
        [(line["step"], line["loss"], line.get("val_loss_quantized")) for line in lines]
        for lines in (
            [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
            for out in (whole, killed)
        )
    ]
    assert losses[0] == losses[1]
    assert [step for step, _, _ in losses[0]] == list(range(1, STEPS + 1))

    # Worlds of other sizes go on with what was learned: no level is due any more.
    wire = checkpoint.read_meta(killed / last)["wire"]
    assert len(wire["levels"]) > 5
    assert len(wire["bits"]) > 5
    start(*flags("killed"), "--steps", str(STEPS + 1), num_ranks=3).succeed()
    later = checkpoint.read_meta(killed / f"checkpoints/step-{STEPS + 1:08d}")["wire"]
    assert (later["levels"], later["bits"]) == (wire["levels"], wire["bits"])
    assert later["step"] > wire["step"]
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    main([*flags("killed"), "--steps", str(STEPS + 2)])
    assert json.loads((killed / "summary.json").read_text())["world_size"] == 1


ACDC = ["--acdc", "--acdc-warmup", "6", "--acdc-phase", "8", "--acdc-last-dense", "2"]
ACDC += ["--acdc-last-sparse", "16"]  # compressed: steps 7 to 14, and from 25 on


@pytest.mark.parametrize("wire", [[], ["--qsdp-bits", "32"]], ids=["stock", "sparse"])
def test_acdc_killed_in_a_phase_on_two_ranks_goes_on_on_four(
    tmp_path: Path, wire: list[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def begin(name: str, num_ranks: int) -> Job:
        flags = ["--data", str(text), "--out", str(tmp_path / name), "--seq-len", "16"]
        flags += ["--batch-size", str(4 // num_ranks), "--eval-every", "0", "--eval-batches", "4"]
        flags += ["--steps", "40", "--save-every", "10", "--keep", "4", "--lr", "1e-2"]
        return start(*flags, *ACDC, *wire, num_ranks=num_ranks)

    begin("whole", 2).succeed()
    metrics = tmp_path / "killed/metrics.jsonl"
    job = begin("killed", 2)
    # After a checkpoint in the middle of a compressed phase, before the next.
    assert job.kill_when(lambda: metrics.exists() and metrics.read_text().count("\n") >= 12)
    assert "step-00000010" in begin("killed", 4).succeed()

    lines = {}
    for name in ("whole", "killed"):
        texts = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines[name] = [json.loads(line) for line in texts]
    assert [line["step"] for line in lines["killed"]] == list(range(1, 41))
    assert [line["pruned"] for line in lines["killed"]] == [
        line["pruned"] for line in lines["whole"]
    ]
    losses = {name: torch.tensor([line["loss"] for line in lines[name]]) for name in lines}
    # Ten of them stay in the phase; 20 go through a dense one into the next.
    torch.testing.assert_close(losses["killed"][10:30], losses["whole"][10:30], atol=1e-5, rtol=0)
    for step in (20, 30, 40):
        masks = {
            name: {
                key: value
                for key, value in tensors(
                    tmp_path / name / f"checkpoints/step-{step:08d}", tmp_path / f"{name}.pt"
                ).items()
                if value.dtype == torch.bool
            }
            for name in lines
        }
        assert len(masks["whole"]) > 10
        assert masks["killed"].keys() == masks["whole"].keys()
        different = [
            key
            for key in masks["whole"]
            if not torch.equal(masks["killed"][key], masks["whole"][key])
        ]
        assert different == [], step
