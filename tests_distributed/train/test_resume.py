"""A run that was killed goes on as if it had not been, bit for bit."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from qsdp import checkpoint
from tests_distributed.support.jobs import Jobs, read_metrics
from tests_distributed.support.launching import SMALL, TEXT

STEPS = 9
FLAGS = [*SMALL, "--steps", str(STEPS), "--save-every", "2", "--eval-every", "3", "--grad-accum"]
FLAGS += ["2", "--qsdp-bits", "4", "--cram", "--lr", "1e-2", "--warmup-steps", "2"]
# Every step of the keys' clock, two an optimizer step, depends on what was learned before it.
FLAGS += ["--qsdp-levels", "learned", "--qsdp-level-steps", ",".join(map(str, range(1, 18)))]
FLAGS += ["--qsdp-gather", "once", "--qsdp-budget", "4.5", "--qsdp-errors", "--one-shot", "none"]


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


def has_logged(out: Path, step: int) -> Callable[[], bool]:
    """Whether the metrics of ``step`` are in the folder of results."""
    metrics = out / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_text().count("\n") >= step


def test_killed_runs_end_with_the_weights_of_an_uninterrupted_one(
    run_jobs: Jobs, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def flags(name: str) -> list[str]:
        return ["--data", str(text), "--out", str(tmp_path / name), *FLAGS]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_jobs.succeed((2,), flags("whole"))

    checkpoints = killed / "checkpoints"
    last_step = random.randint(3, STEPS - 4)  # by then there is a checkpoint of step 2
    run_jobs.killed((2,), flags("killed"), has_logged(killed, last_step), last_step=last_step)
    before = max(checkpoint.steps(checkpoints))

    def is_writing() -> bool:
        # The first checkpoint of a start is not written beside training.
        return any(p.name > f"tmp-step-{before + 2:08d}" for p in checkpoints.glob("tmp-step-*"))

    # Whoever saves more often ends with the same weights, and is caught at it more easily.
    often = [*flags("killed"), "--save-every", "1", "--save-async"]
    printed = run_jobs.killed((2,), often, is_writing, disk_s=0.05)
    assert "Going on from" in printed
    assert not (killed / "summary.json").exists()
    # All ranks hear of what one of them finds damaged, and a scheduler may tell one of them alone
    # that its node is wanted.
    *_, (before, used), (last_step, newest) = checkpoint.steps(checkpoints).items()
    damaged = newest / "__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    [ends] = run_jobs.ends((2,), flags("killed"), told=1)
    assert [end.status for end in ends] == [0, 0]
    assert f"Going on from {used}" in ends[0].printed
    assert f"{damaged} is damaged" in ends[0].complaint
    assert re.search(rf"\b{last_step - before} steps?\.", ends[0].complaint)
    assert not ends[1].complaint
    said = rf"a signal to another rank: step {before + 1} of {STEPS} is saved"
    assert re.search(said, ends[0].printed)
    assert not (killed / "summary.json").exists()
    assert "Going on from" in run_jobs.succeed((2,), flags("killed"))

    last = f"checkpoints/step-{STEPS:08d}"
    expected = tensors(whole / last, tmp_path / "whole.pt")
    found = tensors(killed / last, tmp_path / "killed.pt")
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == [], f"killed after {last_step} steps"
    losses = [
        [(line["step"], line["loss"], line.get("val_loss_quantized")) for line in read_metrics(out)]
        for out in (whole, killed)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _, _ in losses[0]] == list(range(1, STEPS + 1))

    # Worlds of other sizes go on with what was learned: no level is due any more.
    wire = checkpoint.read_meta(killed / last)["wire"]
    assert len(wire["levels"]) > 5
    assert len(wire["bits"]) > 5
    on = ["--resume", str(killed), "--steps"]
    run_jobs.succeed((3,), [*flags("killed"), *on, str(STEPS + 1)])
    later = checkpoint.read_meta(killed / f"checkpoints/step-{STEPS + 1:08d}")["wire"]
    assert (later["levels"], later["bits"]) == (wire["levels"], wire["bits"])
    assert later["step"] > wire["step"]
    run_jobs.succeed((1,), [*flags("killed"), *on, str(STEPS + 2)])
    assert json.loads((killed / "summary.json").read_text())["world_size"] == 1


ACDC = ["--acdc", "--acdc-warmup", "3", "--acdc-phase", "4", "--acdc-last-dense", "2"]
ACDC += ["--acdc-last-sparse", "5"]  # compressed: steps 4 to 7, and from 10 on


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param([], marks=pytest.mark.heavy, id="stock"),
        pytest.param(["--qsdp-bits", "32"], marks=pytest.mark.heavy, id="sparse"),
    ],
)
def test_acdc_killed_in_a_phase_on_two_ranks_goes_on_on_four(
    run_jobs: Jobs, tmp_path: Path, wire: list[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def flags(name: str, num_ranks: int) -> list[str]:
        flags = ["--data", str(text), "--out", str(tmp_path / name), *SMALL]
        flags += ["--batch-size", str(4 // num_ranks), "--eval-every", "0"]
        flags += ["--steps", "14", "--save-every", "5", "--keep", "4", "--lr", "1e-2"]
        return [*flags, "--one-shot", "none", *ACDC, *wire]

    run_jobs.succeed((2,), flags("whole", 2))
    # After a checkpoint in the middle of a compressed phase, before the next.
    is_time = has_logged(tmp_path / "killed", 6)
    run_jobs.killed((2,), flags("killed", 2), is_time, last_step=6)
    on = ["--resume", str(tmp_path / "killed")]
    assert "step-00000005" in run_jobs.succeed((4,), [*flags("killed", 4), *on])

    lines = {name: read_metrics(tmp_path / name) for name in ("whole", "killed")}
    assert [line["step"] for line in lines["killed"]] == list(range(1, 15))
    assert [line["pruned"] for line in lines["killed"]] == [
        line["pruned"] for line in lines["whole"]
    ]
    losses = {name: torch.tensor([line["loss"] for line in lines[name]]) for name in lines}
    # Two stay in the phase; the others go through a dense one into the next.
    torch.testing.assert_close(losses["killed"][5:], losses["whole"][5:], atol=1e-5, rtol=0)
    for step in (10, 14):
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
        assert len(masks["whole"]) == 8
        assert masks["killed"].keys() == masks["whole"].keys()
        different = [
            key
            for key in masks["whole"]
            if not torch.equal(masks["killed"][key], masks["whole"][key])
        ]
        assert different == [], step
