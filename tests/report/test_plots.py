"""The plots of a run: what they show, and which are left out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from qsdp.report.error_plot import draw_errors
from qsdp.report.plots import _plot_loss, remove_stale, write_plots
from tests.support.short_history import short_history, short_summary

matplotlib = pytest.importorskip("matplotlib")

KINDS = ("attn.qkv.weight", "attn.out.weight", "mlp.up.weight", "mlp.down.weight")
SECONDS = [f"{d}_{p}_s" for d in ("gather", "reduce") for p in ("encode", "wire", "decode")]
SUMMARY = {"steps": 4, "val_loss": 2.0, "val_loss_quantized": 2.1, "one_shot": {"0.5": 2.2}}


def history(num_blocks: int, steps: int = 4) -> list[dict[str, Any]]:
    """Metrics with errors at every second step; norms travel raw, so that theirs are 0."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 2.0, "step_s": 0.1, "wire_bytes_sent": 1.0}
        line |= {"wire_bytes_fp32": 4.0} | dict.fromkeys(SECONDS, 0.01)
        if step % 2 == 0:
            errors = {}
            for block in range(num_blocks):
                for kind in KINDS:
                    errors[f"blocks.{block}.{kind}"] = {"weight": random.random(), "grad": 0.5}
                errors[f"blocks.{block}.norm.weight"] = {"weight": 0.0, "grad": 0.0}
            errors["tok.weight"] = {"weight": 0.1, "grad": None}
            line["wire_errors"] = errors
        lines.append(line)
    return lines


def names(folder: Path, lines: list[dict[str, Any]]) -> set[str]:
    return {path.name for path in write_plots(folder, lines, SUMMARY)}


@pytest.mark.slow
def test_what_was_not_measured_is_not_plotted(tmp_path: Path) -> None:
    lines = history(2)
    always = {"loss.png", "one_shot.png", "wire.png", "step_time.png"}
    assert names(tmp_path, lines) == always | {"wire_time.png", "errors.png"}
    plain = [{n: v for n, v in line.items() if n != "wire_errors"} for line in lines]
    assert names(tmp_path, plain) == always | {"wire_time.png"}
    stock = [line | dict.fromkeys(SECONDS) for line in plain]
    assert names(tmp_path, stock) == always
    assert names(tmp_path, []) == always - {"wire.png"}


@pytest.mark.parametrize("num_blocks", [1, 4, 60])
def test_errors_have_a_line_a_kind_of_parameter_however_many_blocks(num_blocks: int) -> None:
    from matplotlib.figure import Figure

    lines = history(num_blocks)
    figure = Figure()
    assert draw_errors(figure, lines)
    over_steps, _, over_blocks, grads_over_blocks = figure.axes
    assert len(over_steps.lines) == len(KINDS) + 1
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"tok.weight", *(f"blocks.*.{kind}" for kind in KINDS)}
    # The embedding is in no block: a line across. Its gradient was not measured.
    assert len(over_blocks.lines) == len(KINDS) + 1
    assert len(grads_over_blocks.lines) == len(KINDS)
    shown = {tuple(line.get_ydata()) for line in over_blocks.lines}
    last = lines[-1]["wire_errors"]
    for kind in KINDS:
        errors = tuple(last[f"blocks.{block}.{kind}"]["weight"] for block in range(num_blocks))
        assert errors in shown


def test_errors_that_are_all_zero_are_drawn_as_no_line() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    assert draw_errors(
        figure, [{"step": 1, "wire_errors": {"a.weight": {"weight": 0.0, "grad": None}}}]
    )
    assert not any(axes.lines for axes in figure.axes)
    assert not draw_errors(Figure(), [{"step": 1}])


@pytest.mark.parametrize("loss", [2.0, None], ids=["finite", "diverged"])
def test_a_plot_of_the_wire_is_drawn_only_where_something_was_sent(
    tmp_path: Path, loss: float | None
) -> None:
    always = ["loss", "one_shot", "step_time"]
    for name, wire_bytes, expected in (("alone", 0.0, always), ("two", 1e6, [*always, "wire"])):
        paths = write_plots(tmp_path / name, short_history(3, wire_bytes), short_summary(loss))
        assert sorted(paths) == sorted((tmp_path / name).iterdir())
        assert sorted(path.stem for path in paths) == expected


def test_skipped_steps_are_marked() -> None:
    from matplotlib.figure import Figure

    lines = [{"step": n, "loss": 2.0, "grad_norm": None if n in (2, 5) else 1.0} for n in range(7)]
    axes = Figure().add_subplot()
    _plot_loss(axes, lines, SUMMARY)
    (marks,) = (line for line in axes.get_lines() if line.get_label() == "skipped")
    assert [*marks.get_xdata()] == [2, 5]


def test_validation_is_seen_beside_that_off_the_wire_and_steps_are_whole() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    _plot_loss(axes, short_history(3, 1e6), short_summary(2.0))
    exact, quantized = axes.get_lines()[-2:]
    assert (exact.get_linestyle(), quantized.get_linestyle()) == ("-", "--")
    assert quantized.get_markersize() > exact.get_markersize()
    assert quantized.get_fillstyle() == "none"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_what_is_not_drawn_any_more_goes_also_where_its_drawing_was_killed(tmp_path: Path) -> None:
    for name in ("loss.png", "wire_time.png", "pruned.png.tmp", "note.png"):
        (tmp_path / name).touch()
    assert remove_stale(tmp_path, [tmp_path / "loss.png"]) == ["wire_time.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "note.png"]
