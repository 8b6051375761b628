"""A run with kept codes that is killed again and again, at any instant, ends as if it had not."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests_distributed.support.jobs import Jobs, read_metrics
from tests_distributed.support.launching import SMALL, TEXT
from tests_distributed.train.test_resume import has_logged, tensors
from tests_distributed.train.test_resumed_grids import ANEW, same

STEPS = 16
AHEAD = 2
"""A kill comes so many steps after one that is in the metrics, at the latest."""
FLAGS = [*SMALL, "--steps", str(STEPS), "--save-every", "2", "--eval-every", "3", "--lr", "1e-2"]
FLAGS += ["--one-shot", "none", "--qsdp-bits", "4", "--qsdp-gather", "delta", "--save-async"]
FLAGS += ["--qsdp-delta-redraw-every", "5"]
METHODS = {
    "none": [],
    "cram": ["--cram"],
    "sam": ["--sam", "--grad-accum", "2"],
    "acdc": [
        *("--acdc", "--acdc-warmup", "2", "--acdc-phase", "3", "--acdc-last-dense", "2"),
        *("--acdc-last-sparse", "3"),
    ],
    "gmp": ["--gmp", "--gmp-start", "2", "--gmp-every", "3", "--gmp-end", "12"],
    "warm-up and budget": ["--qsdp-budget", "5", "--qsdp-warmup-steps", "3"],
}


def _soon_after(out: Path, step: int) -> Callable[[], bool]:
    """Whether some random time has passed since the metrics of ``step`` were written."""
    has_begun, wait_s, since = has_logged(out, step), random.uniform(0, 0.15), list[float]()

    def is_time() -> bool:
        if not since and has_begun():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= wait_s

    return is_time


@pytest.mark.heavy
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_kills_at_any_instant_change_no_number(
    run_jobs: Jobs, tmp_path: Path, method: str, ranks: int
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)

    def flags(name: str) -> list[str]:
        data = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / name)]
        return [*data, *FLAGS, *METHODS[method]]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_jobs.succeed((ranks,), flags("whole"))
    steps, step = [], 0
    while (step := step + random.randint(1, 3)) + AHEAD < STEPS:
        steps.append(step)
        # A slow disk makes it likely that a checkpoint is half written.
        run_jobs.killed(
            (ranks,),
            flags("killed"),
            _soon_after(killed, step),
            last_step=step + AHEAD,
            disk_s=random.choice([0.0, 0.02]),
        )
    printed = run_jobs.succeed((ranks,), flags("killed"))
    assert ANEW not in printed
    last = f"checkpoints/step-{STEPS:08d}"
    expected = tensors(whole / last, tmp_path / "whole.pt")
    found = tensors(killed / last, tmp_path / "killed.pt")
    assert expected.keys() == found.keys()
    different = [name for name in expected if not same(expected[name], found[name])]
    assert different == [], f"killed after {steps}"
    losses = [
        [(line["step"], line["loss"], line.get("val_loss_quantized")) for line in read_metrics(out)]
        for out in (whole, killed)
    ]
    assert losses[0] == losses[1], f"killed after {steps}"
