"""What the tables at the end of a run say, whoever trained."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from qsdp.report.step_line import step_metrics
from qsdp.report.summary_tables import print_summary

WIRE = {
    **dict.fromkeys(("sent_bytes_per_step", "fp32_bytes_per_step", "other_bytes_per_step"), 8.0),
    "inter_node_bytes_per_step": {"gather": None, "reduce": None},
    "seconds_per_step": {"gather_wire_s": None},
    "source": "counted",
}
SUMMARY = {
    "val_loss": 2.0,
    "val_loss_quantized": None,
    "one_shot": {"0.5": 2.5},
    "sparsity": {"prunable": 0.0, "model": 0.0},
    **dict.fromkeys(("steps", "steps_measured"), 3),
    "skipped_steps": 0,
    **dict.fromkeys(("step_s_median", "tokens_per_s", "mfu", "sample")),
    "wire": WIRE,
}


def printed(**more: Any) -> dict[str, str]:
    """The losses that are shown, by their rows."""
    console = Console(file=io.StringIO(), width=100)
    print_summary(console, {**SUMMARY, **more})  # type: ignore[typeddict-item]
    text = console.file.getvalue().partition("Bytes that")[0]  # type: ignore[attr-defined]
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return {name.strip(): loss.strip() for name, loss in rows}


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ({}, {}),
        ({"dense_twin_val_loss": None}, {}),
        ({"dense_twin_val_loss": 1.875}, {"its dense twin": "1.8750"}),
        (
            {"best_of_all_val_loss": 1, "teacher_val_loss": 1.5, "val_loss_of": 3.0},
            {"its best of all": "1.0000", "its teacher": "1.5000"},
        ),
    ],
)
def test_a_model_that_was_kept_beside_is_shown_by_its_name(
    more: dict[str, Any], rows: dict[str, str]
) -> None:
    plain = {"dense, exact": "2.0000", "50% pruned in one shot": "2.5000"}
    assert printed(**more) == plain | rows
    assert list(printed(**more))[1:-1] == list(rows)


def test_what_is_no_number_in_a_line_counts_for_nothing() -> None:
    lines: list[Any] = [{"step": 1, "lr": 3}, {"step": 2, "lr": "3"}, {"step": 3, "lr": None}]
    assert step_metrics([*lines, {"step": 4}], "lr") == [3.0]
    assert repr(step_metrics(lines, "lr")) == "[3.0]"
