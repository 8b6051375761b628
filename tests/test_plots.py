"""What the plots of a run show, and which are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qsdp.train.plots import _plot_loss, write_plots


def history(num_steps: int, wire_bytes: float) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss": 2.0 if step % 2 else None,
            "step_s": 0.1,
            "wire_bytes_sent": wire_bytes,
            "wire_bytes_fp32": 4 * wire_bytes,
        }
        for step in range(1, num_steps + 1)
    ]


def summary(loss: float | None) -> dict[str, Any]:
    one_shot = {"0.5": loss, "0.9": None}
    return {"steps": 3, "val_loss": loss, "val_loss_quantized": loss, "one_shot": one_shot}


@pytest.mark.parametrize("loss", [2.0, None], ids=["finite", "diverged"])
def test_a_plot_of_the_wire_is_drawn_only_where_something_was_sent(
    tmp_path: Path, loss: float | None
) -> None:
    pytest.importorskip("matplotlib")
    always = ["loss", "one_shot", "step_time"]
    for name, wire_bytes, expected in (("alone", 0.0, always), ("two", 1e6, [*always, "wire"])):
        paths = write_plots(tmp_path / name, history(3, wire_bytes), summary(loss))
        assert sorted(paths) == sorted((tmp_path / name).iterdir())
        assert sorted(path.stem for path in paths) == expected


def test_validation_is_seen_beside_that_off_the_wire_and_steps_are_whole() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    _plot_loss(axes, history(3, 1e6), summary(2.0))
    exact, quantized = axes.get_lines()[-2:]
    assert (exact.get_linestyle(), quantized.get_linestyle()) == ("-", "--")
    assert quantized.get_markersize() > exact.get_markersize()
    assert quantized.get_fillstyle() == "none"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
