"""A run with --qsdp-gather delta that was killed goes on as if it had not been, bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from qsdp import checkpoint
from qsdp.checkpoint.meta_json import sealed
from tests_distributed.support.jobs import Jobs, read_metrics
from tests_distributed.support.launching import SMALL, TEXT
from tests_distributed.train.test_resume import has_logged, tensors

STEPS = 10
LAST = f"checkpoints/step-{STEPS:08d}"
FLAGS = [*SMALL, "--steps", str(STEPS), "--save-every", "2", "--eval-every", "3", "--lr", "1e-2"]
FLAGS += ["--one-shot", "none", "--qsdp-bits", "4", "--qsdp-gather", "delta"]
FLAGS += ["--qsdp-delta-redraw-every", "5"]
ANEW = "all grids of the weights are drawn anew, as the"
METHODS = {
    "none": ["--qsdp-errors", "--save-async"],
    "acdc": [
        # Compressed: step 2, and from 4 on.
        *("--acdc", "--acdc-warmup", "1", "--acdc-phase", "1", "--acdc-last-dense", "1"),
        *("--acdc-last-sparse", "7"),
    ],
    "cram": ["--cram", "--grad-accum", "2"],
    "budget": ["--qsdp-budget", "5", "--qsdp-warmup-steps", "2"],
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.heavy  # within one process tests_distributed/fsdp/test_kept_grids.py has the same
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_with_weights_and_grids_of_an_uninterrupted_one(
    run_jobs: Jobs, text: Path, method: str
) -> None:
    _assert_going_on_changes_nothing(run_jobs, text, 2, *[METHODS[method]] * 3)


@pytest.mark.heavy
@pytest.mark.parametrize(("first", "second"), [("rank", "node"), ("node", "rank")])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_as_if_its_codes_had_been_kept_elsewhere(
    run_jobs: Jobs, text: Path, method: str, first: str, second: str
) -> None:
    ways = [
        [*METHODS[method], "--qsdp-ranks-per-node", "2", "--qsdp-delta-codes", codes]
        for codes in ("rank", first, second)
    ]
    _assert_going_on_changes_nothing(run_jobs, text, 4, *ways)


def _assert_going_on_changes_nothing(
    run_jobs: Jobs, text: Path, ranks: int, plain: list[str], before: list[str], after: list[str]
) -> None:
    """A run with the flags ``before`` that is killed and goes on with ``after`` ends as ``plain``.

    Weights, moments and grids are equal bit for bit, and so are the losses.
    """
    home = text.parent

    def flags(name: str, own: list[str]) -> list[str]:
        return ["--data", str(text), "--out", str(home / name), *FLAGS, *own]

    whole, killed = home / "whole", home / "killed"
    assert ANEW not in run_jobs.succeed((ranks,), flags("whole", plain))
    last_step = random.randint(3, STEPS - 2)  # by then there is a checkpoint of step 2
    run_jobs.killed(
        (ranks,), flags("killed", before), has_logged(killed, last_step), last_step=last_step
    )
    printed = run_jobs.succeed((ranks,), flags("killed", after))
    assert "Going on from" in printed
    assert ANEW not in printed
    expected = tensors(whole / LAST, home / "whole.pt")
    found = tensors(killed / LAST, home / "killed.pt")
    assert expected.keys() == found.keys()
    assert sum(name.endswith(".epoch") for name in found) > 5
    different = [name for name in expected if not same(expected[name], found[name])]
    assert different == [], f"killed after {last_step} steps"
    losses = [[(x["step"], x["loss"]) for x in read_metrics(out)] for out in (whole, killed)]
    assert losses[0] == losses[1]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: NaN too."""
    both = [each.contiguous().view(-1).view(torch.uint8) for each in (one, other)]
    return one.dtype == other.dtype and torch.equal(*both)


def test_a_run_that_cannot_keep_its_grids_says_why(run_jobs: Jobs, text: Path) -> None:
    out = text.parent / "out"
    flags = ["--data", str(text), "--out", str(out), *FLAGS, "--steps", "2"]
    run_jobs.succeed((2,), flags)
    on = [*flags, "--resume", str(out), "--steps"]

    def first_of(printed: str) -> str:
        lines = [line.strip() for line in printed.splitlines() if ANEW in line]
        return lines[0] if len(lines) == 1 else f"{len(lines)} lines"

    printed = run_jobs.succeed((3,), [*on, "3"])
    assert first_of(printed) == f"{ANEW} checkpoint is of 2 ranks, not 3"
    printed = run_jobs.succeed((3,), [*on, "4", "--qsdp-bits", "5"])
    kinds = "bits, buckets, roundings or masks"
    assert first_of(printed) == f"{ANEW} checkpoint is of other {kinds}"
    # As a version wrote it that kept none.
    path = checkpoint.latest(out / "checkpoints")
    assert path is not None
    meta = json.loads((path / "meta.json").read_text())
    del meta["wire"]["grids"], meta["checksum"]
    (path / "meta.json").write_text(sealed(meta))
    printed = run_jobs.succeed((3,), [*on, "5", "--qsdp-bits", "5"])
    assert first_of(printed) == f"{ANEW} checkpoint is of an older version, which kept none"
    printed = run_jobs.succeed((1,), [*on, "6", "--qsdp-bits", "5"])
    assert first_of(printed) == "0 lines"
    assert "Going on from" in printed
