"""AC/DC's dense twin is dense."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qsdp.checkpoint import TensorReader, latest, read_meta, verify
from qsdp.commands import train
from qsdp.methods.acdc.flags import DENSE_TWIN
from qsdp.models.gpt2.model import GPT
from qsdp.sparsity.prunable import prunable_parameters
from qsdp.train import loop
from qsdp.train.job import Job
from qsdp.train.trained_model import open_trained_model
from qsdp.train.validate import Evaluator
from tests.support.bad_inputs import TEXT

pytestmark = pytest.mark.usefixtures("world_of_one", "brief_ends")

FLAGS = ["--acdc", "--steps", "14", "--acdc-warmup", "2", "--acdc-phase", "2"]
FLAGS += ["--acdc-last-dense", "3", "--acdc-last-sparse", "3", "--acdc-sparsity", "0.1"]
FLAGS += ["--model", "tiny", "--seq-len", "8", "--batch-size", "2", "--eval-batches", "1"]
FLAGS += ["--warmup-steps", "1", "--lr", "1e-2", "--one-shot", "none", "--save-every", "0"]
LAST_DENSE = (9, 10, 11)  # steps 7 and 8 are compressed, and after step 11 the weights are pruned


@pytest.mark.parametrize("eval_every", [1, LAST_DENSE[-1]])
@pytest.mark.parametrize("skipped", [(), LAST_DENSE[:1], LAST_DENSE], ids=str)
def test_the_dense_twin_has_no_pruned_weight(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    skipped: tuple[int, ...],
    eval_every: int,
) -> None:
    forward_backward = loop.run_micro_batches

    def with_bad_gradients(job: Job) -> torch.Tensor:
        loss = forward_backward(job)
        if job.steps_done + 1 in skipped:
            next(job.model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
        return loss

    def better_when_pruned(evaluator: Evaluator, *, exact: bool = True) -> float:
        return 1 - evaluator.sparsity()["prunable"]

    monkeypatch.setattr(loop, "run_micro_batches", with_bad_gradients)
    monkeypatch.setattr(Evaluator, "loss", better_when_pruned)
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    train.main([*flags, *FLAGS, "--eval-every", str(eval_every)])

    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["sparsity"]["prunable"] == pytest.approx(0.1, abs=1e-3)
    why = "No dense twin was kept: 10% of the prunable weights were zero in the last dense phase\n"
    assert (why in capsys.readouterr().out) is (skipped == LAST_DENSE)
    twin = latest(tmp_path / "run" / DENSE_TWIN)
    if skipped == LAST_DENSE:  # the model was never dense again
        assert twin is None
        assert summary["dense_twin_val_loss"] is None
        return
    assert twin is not None
    assert read_meta(twin)["step"] in LAST_DENSE
    assert summary["dense_twin_val_loss"] == 1.0
    with torch.device("meta"):
        model = GPT(open_trained_model(twin).size)
    weights = [TensorReader(twin).read(name) for name in prunable_parameters(model)]
    assert sum(int((weight == 0).sum()) for weight in weights) == 0


def test_a_run_without_a_finite_loss_says_why_it_has_no_twin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Evaluator, "loss", lambda *_, **__: math.nan)
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    train.main([*flags, *FLAGS, "--eval-every", "0"])
    assert "twin was kept: the validation loss was not finite" in capsys.readouterr().out


def test_a_twin_stays_until_the_run_that_replaces_it_has_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "run"
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(out), *FLAGS, "--eval-every", "0"]

    def loss() -> float:
        summary = json.loads((out / "summary.json").read_text())
        twin = latest(out / DENSE_TWIN)
        assert twin is not None
        assert summary["dense_twin_val_loss"] == read_meta(twin)["val_loss"]
        assert read_meta(twin)["config"]["lr"] == summary["config"]["lr"]
        return float(summary["dense_twin_val_loss"])

    train.main(flags)
    old = loss()
    take = loop.train_step

    def cut_after_the_twin(job: Job, **options: Any) -> Any:
        if job.steps_done == LAST_DENSE[-1]:
            raise KeyboardInterrupt
        return take(job, **options)

    other = [*flags, "--lr", "2e-2", "--resume", "none"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", cut_after_the_twin)
        with pytest.raises(SystemExit):
            train.main(other)
    dist.destroy_process_group()
    assert loss() == old
    assert len([*out.glob("dense-twin.*")]) == 1
    train.main(flags)  # which is finished
    assert loss() == old
    train.main(other)
    assert loss() != old
    assert [path.name for path in out.glob("dense-twin*")] == ["dense-twin"]


def test_a_run_that_is_cut_where_it_takes_over_has_no_twin_of_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "run"
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(out), *FLAGS, "--eval-every", "0"]
    flags += ["--save-every", "4", "--keep", "9"]
    train.main(flags)
    back = str(out / "checkpoints" / "step-00000004")
    other = [*flags, "--lr", "1e-4", "--resume", back]

    def cut(job: Job) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Job, "_settle", cut)
        with pytest.raises(SystemExit):
            train.main(other)
    dist.destroy_process_group()
    train.main(other)
    summary = json.loads((out / "summary.json").read_text())
    twin = latest(out / DENSE_TWIN)
    assert twin is not None
    assert read_meta(twin)["config"]["lr"] == summary["config"]["lr"] == 1e-4
    assert summary["dense_twin_val_loss"] == read_meta(twin)["val_loss"]


@pytest.mark.parametrize("save_every", [5, 12])
def test_a_damaged_twin_counts_as_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], save_every: int
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "run"
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(out), *FLAGS, "--eval-every", "0"]
    flags += ["--save-every", str(save_every)]
    train.main(flags)
    twin = latest(out / DENSE_TWIN)
    assert twin is not None
    data = twin / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    shutil.rmtree(out / "checkpoints" / "step-00000014")
    capfd.readouterr()
    train.main(flags)
    printed = capfd.readouterr()
    assert re.fullmatch(rf"warning: {data} is damaged .*, .* counts as none\.\n", printed.err)
    loss = json.loads((out / "summary.json").read_text())["dense_twin_val_loss"]
    if save_every == 12:  # the last dense phase was over
        assert loss is None
        assert f"No dense twin was kept: {data} is damaged" in printed.out
        return
    again = latest(out / DENSE_TWIN)
    assert again is not None
    verify(again)
    assert loss == read_meta(again)["val_loss"]
    assert len([*(out / DENSE_TWIN).iterdir()]) == 1
