"""What a method is told beside its steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsdp.commands import train
from qsdp.methods.method import Companion, Method, MethodRun, Outcome
from tests.support.bad_inputs import TEXT

pytestmark = pytest.mark.usefixtures("world_of_one", "brief_ends", "no_peak")


def test_a_companion_hears_of_every_validation_before_it_is_asked_for_its_outcome(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[tuple[int, float]] = []

    class Listener(Companion):
        def __init__(self, run: MethodRun) -> None:
            self.run = run

        def after_validation(self, steps_done: int, loss: float) -> None:
            assert self.run.steps_done == steps_done
            heard.append((steps_done, loss))

        def outcome(self) -> Outcome:
            results = {"best_val_loss": min(loss for _, loss in heard), "heard": len(heard)}
            return Outcome(results, f"Heard {len(heard)} times")

    monkeypatch.setattr(Method, "companion", lambda method, run: Listener(run))
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    flags += ["--model", "tiny", "--seq-len", "8", "--batch-size", "2", "--eval-batches", "1"]
    train.main([*flags, "--steps", "5", "--eval-every", "2", "--one-shot", "none"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    told = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert [*told] == [2, 4]
    assert dict(heard) == told | {5: summary["val_loss"]}
    assert (summary["best_val_loss"], summary["heard"]) == (min(dict(heard).values()), 3)
    assert "Heard 3 times" in capsys.readouterr().out
