"""A step whose loss or gradient is not finite is as if it had been left out.

A row of them ends the run, and what is on disk by then can be gone on from.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from qsdp import checkpoint
from qsdp.commands import train
from qsdp.methods.clip_grad import clip_grad_norm_
from qsdp.methods.grad_norm import global_grad_norm
from qsdp.train import loop, make_optimizer
from qsdp.train.job import Job
from tests.support.bad_inputs import TEXT
from tests.support.command_line import refused
from tests.support.ends import told, weights

pytestmark = pytest.mark.usefixtures("world_of_one", "brief_ends", "no_peak")

METHODS = {
    "adamw": [],
    "cram": ["--cram"],
    "sam": ["--sam"],
    "acdc": [*("--acdc", "--acdc-warmup", "1", "--acdc-phase", "1"), "--acdc-last-sparse", "1"],
    "gmp": [*("--gmp", "--gmp-start", "1", "--gmp-every", "1"), "--gmp-end", "3"],
}
METHODS["acdc"] += ["--acdc-last-dense", "1"]
STEPS = 5
Fault = tuple[str, int]
"""``loss``, or the name of a parameter whose gradient it is, and in which pass of the step."""


def flags(folder: Path, *more: str) -> list[str]:
    (folder / "text.txt").write_text(TEXT)
    return [
        *("--data", str(folder / "text.txt"), "--out", str(folder / "out"), "--model", "tiny"),
        *("--seq-len", "8", "--batch-size", "2", "--eval-batches", "1", "--eval-every", "0"),
        *("--one-shot", "none", "--warmup-steps", "1", "--steps", str(STEPS), *more),
    ]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Fault]], None]:
    """``spoil(faults)``: what is not finite, by step."""
    forward_backward = loop.run_micro_batches

    def with_faults(faults: dict[int, Fault]) -> None:
        passes: dict[int, int] = {}

        def run(job: Job) -> torch.Tensor:
            loss, step = forward_backward(job), job.steps_done + 1
            passes[step] = passes.get(step, 0) + 1
            what, in_pass = faults.get(step, ("", 0))
            if passes[step] == in_pass and what != "loss":
                grad: Any = job.model.get_parameter(what).grad
                grad.to_local().fill_(-math.inf)  # masks take a part of it away
            return loss * math.inf if (what, passes[step]) == ("loss", in_pass) else loss

        monkeypatch.setattr(loop, "run_micro_batches", run)

    return with_faults


def without_step(monkeypatch: pytest.MonkeyPatch, left_out: int) -> None:
    """Let the base optimizer leave one of its steps out."""
    make = make_optimizer.make_optimizer

    def make_one(config: Any, model: Any) -> torch.optim.Optimizer:
        optimizer: Any = make(config, model)
        base = getattr(optimizer, "base", optimizer)
        step, count = base.step, 0

        def sometimes(*args: Any) -> Any:
            nonlocal count
            count += 1
            return None if count == left_out else step(*args)

        base.step = sometimes
        return optimizer

    monkeypatch.setattr("qsdp.train.setup.make_optimizer", make_one)


def lines(folder: Path, name: str) -> list[Any]:
    text = (folder / "out/metrics.jsonl").read_text()
    return [json.loads(line)[name] for line in text.splitlines()]


def final(folder: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(folder / "out/checkpoints")
    assert path is not None
    assert path.name == f"step-{STEPS:08d}"
    return weights(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "what", "in_pass"),
    [
        *(("adamw", "loss", 1), ("adamw", "blocks.1.mlp.down.weight", 1)),
        *(("cram", "loss", 2), ("sam", "norm_out.weight", 2), ("sam", "loss", 1)),
        *(("acdc", "loss", 1), ("gmp", "embed.weight", 1)),
    ],
)
def test_a_run_goes_on_as_if_the_step_had_been_left_out(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[dict[int, Fault]], None],
    method: str,
    what: str,
    in_pass: int,
) -> None:
    for name in ("skipping", "reference"):
        (tmp_path / name).mkdir()
    spoil({3: (what, in_pass)})
    train.main(flags(tmp_path / "skipping", *METHODS[method], "--max-bad-steps", "2"))
    printed = capsys.readouterr().out
    named = what if what == "loss" else f"gradient of {what}"
    assert f"step 3 is skipped, not finite is the {named}" in printed
    assert "  1 skipped  " in printed  # the last step's line of progress
    assert "Of 5 steps 1 were skipped" in " ".join(printed.split())
    assert lines(tmp_path / "skipping", "skipped_steps") == [0, 0, 1, 1, 1]
    assert [norm is None for norm in lines(tmp_path / "skipping", "grad_norm")][2]
    assert lines(tmp_path / "skipping", "loss").count(None) == (what == "loss" and in_pass == 1)
    summary = json.loads((tmp_path / "skipping/out/summary.json").read_text())
    assert summary["skipped_steps"] == 1

    spoil({})
    without_step(monkeypatch, 3)
    train.main(flags(tmp_path / "reference", *METHODS[method]))
    assert "skipped" not in capsys.readouterr().out
    expected = final(tmp_path / "reference")
    for name, found in final(tmp_path / "skipping").items():
        assert torch.equal(found, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adamw", "cram"])
def test_a_row_of_bad_steps_ends_the_run_and_pushes_no_checkpoint_out(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    spoil: Callable[[dict[int, Fault]], None],
    method: str,
) -> None:
    folder = tmp_path / "out/checkpoints"
    command = flags(tmp_path, *METHODS[method], "--save-every", "1", "--max-bad-steps", "2")
    in_pass = 2 if method == "cram" else 1
    bad = ("blocks.0.attn.qkv.weight", in_pass)
    spoil({2: ("loss", 1), 4: bad, 5: bad})
    said = refused(command, capfd)
    assert "--max-bad-steps is 2, and steps 4 to 5 had no finite loss and gradient" in said
    assert "in step 5: the gradient of blocks.0.attn.qkv.weight" in said
    assert ("in the second pass" in said) == (method == "cram")
    assert f"the last good checkpoint is {folder / 'step-00000003'}: go on from it" in said
    assert [*checkpoint.steps(folder)] == [1, 3]  # that of step 2 was put off
    assert lines(tmp_path, "skipped_steps") == [0, 1, 1, 2, 3]
    # The very command goes on, with the count of its checkpoint.
    spoil({})
    train.main(command)
    assert lines(tmp_path, "skipped_steps") == [0, 1, 1, 1, 1]
    assert all(weight.isfinite().all() for weight in final(tmp_path).values())
    last = checkpoint.latest(folder)
    assert last is not None
    assert checkpoint.read_meta(last)["skipped_steps"] == 1


@pytest.mark.slow
def test_the_end_of_a_run_is_saved_though_its_last_step_was_bad(
    tmp_path: Path, spoil: Callable[[dict[int, Fault]], None]
) -> None:
    spoil({4: ("loss", 1), 5: ("loss", 1)})
    train.main(flags(tmp_path, "--save-every", "4"))
    final(tmp_path)
    assert [*checkpoint.steps(tmp_path / "out/checkpoints")] == [5]


@pytest.mark.parametrize("method", ["adamw", "cram", "gmp"])
def test_a_run_told_to_end_before_its_first_good_step_goes_on_as_if_it_had_not_been_told(
    tmp_path: Path, spoil: Callable[[dict[int, Fault]], None], method: str
) -> None:
    """Neither the gradients that a bad step leaves nor DCP tell in what is saved.

    DCP fills an empty state by a step that the base would count.
    """
    for name in ("told", "whole"):
        (tmp_path / name).mkdir()
    faults: dict[int, Fault] = {1: ("loss", 1), 2: ("loss", 1)}
    spoil(faults)
    train.main(flags(tmp_path / "whole", *METHODS[method], "--save-every", "0"))
    spoil(faults)
    command = flags(tmp_path / "told", *METHODS[method], "--save-every", "0")
    for _ in range(2):
        with told(loop, "run_micro_batches", 1, signal.SIGTERM):
            train.main(command)
    assert [*checkpoint.steps(tmp_path / "told/out/checkpoints")] == [1, 2]
    train.main(command)
    if method == "cram":  # neither had a second pass
        assert lines(tmp_path / "told", "pruned")[:2] == [0.0, 0.0]
    expected = final(tmp_path / "whole")
    for name, found in final(tmp_path / "told").items():
        assert torch.equal(found, expected[name]), name


def test_a_row_of_bad_steps_goes_on_over_resumes_and_keeps_what_was_good(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[dict[int, Fault]], None]
) -> None:
    spoil(dict.fromkeys((3, 4, 5), ("loss", 1)))
    good = ("--save-every", "2", "--keep", "1", "--max-bad-steps", "3", "--eval-every", "1")
    command = flags(tmp_path, *good)
    with told(loop, "run_micro_batches", 3, signal.SIGTERM):
        train.main(command)
    with told(loop, "run_micro_batches", 1, signal.SIGTERM):
        train.main(command)
    folder = tmp_path / "out/checkpoints"
    assert [*checkpoint.steps(folder)] == [2, 3, 4]
    capfd.readouterr()
    with told(loop, "run_micro_batches", 1, signal.SIGTERM):  # the row comes first
        said = refused(command, capfd)
    assert "steps 3 to 5 had no finite loss" in said
    assert f"the last good checkpoint is {folder / 'step-00000002'}: go on" in said
    assert [*checkpoint.steps(folder)] == [2, 3, 4]


def test_moments_that_are_not_finite_are_never_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Gradients are, and weights: these would never move again."""
    forward_backward = loop.run_micro_batches

    def huge(job: Job) -> torch.Tensor:
        loss = forward_backward(job)
        for parameter in job.model.parameters():
            cast(Any, parameter.grad).mul_(1e22)
        return loss

    monkeypatch.setattr(loop, "run_micro_batches", huge)
    said = refused(flags(tmp_path, "--clip-grad", "0", "--save-every", "1"), capfd)
    assert "exp_avg_sq of embed.weight is not finite on rank 0 after step 1" in said
    assert not checkpoint.steps(tmp_path / "out/checkpoints")


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out/checkpoints"
    huge = ("--lr", "1e40", "--save-every", "1")
    said = refused(flags(tmp_path, *huge), capfd)
    assert "embed.weight is not finite on rank 0 after step 1" in said
    assert "there is no checkpoint yet: begin anew with a lower --lr" in said
    assert not checkpoint.steps(folder)

    train.main(flags(tmp_path, "--steps", "2"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capfd.readouterr()
    said = refused(flags(tmp_path, *huge, "--resume", str(folder)), capfd)
    assert "embed.weight is not finite on rank 0 after step 3" in said
    assert f"the last good checkpoint is {folder / 'step-00000002'}" in said
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, torch.tensor([math.nan])])
def test_a_loss_that_is_not_finite_makes_the_norm_nan_and_another_changes_nothing(
    loss: Any,
) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([3.0, 4.0, 0.0])
    for fine in (None, 2.5, torch.tensor(1e30), torch.tensor([-1.0], dtype=torch.bfloat16)):
        assert global_grad_norm([weight], loss=fine) == 5.0
    assert math.isnan(global_grad_norm([weight], loss=loss))
    assert math.isnan(clip_grad_norm_([weight], 1.0, loss=loss))


@pytest.mark.parametrize("loss", ["low", torch.ones(2), torch.tensor(1), (1.0,)])
def test_what_is_no_loss_is_refused(loss: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"loss is .*: give a float, or"):
        clip_grad_norm_([weight], 1.0, loss=loss)
