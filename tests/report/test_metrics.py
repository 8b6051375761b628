"""metrics.jsonl: what is written, and what is read back."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import pytest

from qsdp.report.metrics import MetricsWriter, read_metrics

ERRORS = {"a.weight": {"weight": 0.25, "grad": None}, "b.weight": {"weight": math.nan, "grad": 2.0}}
WRITTEN = {"a.weight": {"weight": 0.25, "grad": None}, "b.weight": {"weight": None, "grad": 2.0}}


def test_numbers_by_name_are_written_and_kept_on_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.log({"step": 1, "loss": math.inf, "wire_errors": ERRORS})
        writer.log({"step": 2, "loss": 1.0})
    expected = {"step": 1, "loss": None, "wire_errors": WRITTEN}
    assert json.loads(path.read_text().splitlines()[0]) == expected
    with MetricsWriter(path, last_step=1, needed=["loss"]) as writer:
        assert writer.history == [expected]
    assert read_metrics(path) == [expected]


def test_lines_of_a_long_run_are_not_kept_in_memory(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        tracemalloc.start()
        for step in range(2000):
            writer.log({"step": step, "errors": {f"{step} {i}": float(i) for i in range(20)}})
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 1e5
        assert [line["step"] for line in writer.history] == [*range(2000)]


@pytest.mark.parametrize(
    "value", ["text", [1.0], {"a": "text"}, {"a": {"b": []}}, True, math.nan, math.inf, 10**400]
)
def test_a_line_with_anything_but_numbers_counts_as_torn(tmp_path: Path, value: object) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": value}) + '\n{"step": 2, "loss": 1.0}\n')
    assert read_metrics(path) == [{"step": 2, "loss": 1.0}]


def test_a_needed_number_is_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = {"step": 3, "step_s": 1, "loss": None}
    torn = [{"step": 1, "loss": 1.0}, {"step": 2, "step_s": None, "loss": 1.0}]
    torn += [{"step": 2, "step_s": {"a": 1.0}, "loss": 1.0}, {"step": 2, "step_s": 1.0}]
    torn += [{"step": 2, "step_s": 1.0, "loss": {"a": 1.0}}]
    with MetricsWriter(path, last_step=3, needed=["step_s", "loss"]) as writer:
        path.write_text("".join(f"{json.dumps(line)}\n" for line in [*torn, whole]))
        assert writer.history == [whole]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "events") as writer:
        writer.log({"step": 1, "loss": 3.0, "wire_errors": ERRORS})
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *("loss", "wire_errors/a.weight/weight", "wire_errors/b.weight/grad"),
        "wire_errors/b.weight/weight",
    }
    assert math.isnan(events.Scalars("wire_errors/b.weight/weight")[0].value)
