"""errors.png: how exactly each parameter and its gradient cross the wire."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from typing import Any, Literal

from qsdp.report.step_line import History, StepLine

Errors = dict[str, float]
"""The error of each parameter, at one step."""
Part = Literal["weight", "grad"]
_PARTS: tuple[tuple[Part, str], ...] = (("weight", "Weights"), ("grad", "Gradients"))


def draw_errors(figure: Any, history: History) -> bool:
    """Draw the ``wire_errors`` of a run's metrics; False, and nothing drawn, if there are none.

    A line stands for one kind of parameter, those whose names differ in the block's number only:
    few enough to tell apart, however many blocks. Above, its median and range over all blocks at
    each validation; below, each block at the last one. What travels exactly is left out.
    """
    measured = [line for line in history if line.get("wire_errors")]
    if not measured:
        return False
    axes = figure.subplots(2, 2, sharey="col")
    shown_names = {name for line in measured for part, _ in _PARTS for name in _errors(line, part)}
    kinds = sorted({_kind(name)[0] for name in shown_names})
    shown: dict[str, Any] = {}
    for column, (part, title) in enumerate(_PARTS):
        steps = {line["step"]: _errors(line, part) for line in measured}
        last = max((step for step, errors in steps.items() if errors), default=None)
        for number, kind in enumerate(kinds):
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            over_steps = {
                step: list(_errors_of_kind(errors, kind)) for step, errors in steps.items()
            }
            over_steps = {step: values for step, values in over_steps.items() if values}
            if not over_steps:
                continue
            shown[kind] = _draw_steps(axes[0][column], over_steps, style)
            if last in over_steps:
                _draw_blocks(axes[1][column], over_steps[last], style)
        axes[0][column].set(title=title, xlabel="step", ylabel="relative error")
        axes[1][column].set(xlabel=f"block, after step {last}", ylabel="relative error")
        for each in axes[:, column]:
            if last is not None:
                each.set_yscale("log")
            each.grid(alpha=0.3, which="both")
            for side in ("top", "right"):
                each.spines[side].set_visible(False)
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize="small")
    return True


def _draw_steps(axes: Any, points: dict[int, list[tuple[int | None, float]]], style: Any) -> Any:
    values = {step: [error for _, error in blocks] for step, blocks in points.items()}
    (line,) = axes.plot(
        values.keys(), [statistics.median(v) for v in values.values()], marker=".", **style
    )
    lowest, highest = [min(v) for v in values.values()], [max(v) for v in values.values()]
    axes.fill_between(values.keys(), lowest, highest, color=style["color"], alpha=0.12, linewidth=0)
    return line


def _draw_blocks(axes: Any, points: list[tuple[int | None, float]], style: Any) -> None:
    blocks = sorted((block, error) for block, error in points if block is not None)
    if blocks:
        axes.plot(*zip(*blocks, strict=True), marker=".", **style)
    for block, error in points:
        if block is None:
            axes.axhline(error, linewidth=1, alpha=0.6, **style)


def _errors(line: StepLine, part: Part) -> Errors:
    """The errors of one step that a logarithmic axis can show."""
    errors = {name: error.get(part) for name, error in line["wire_errors"].items()}
    return {name: error for name, error in errors.items() if error is not None and error > 0}


def _errors_of_kind(errors: Errors, kind: str) -> Iterable[tuple[int | None, float]]:
    for name, error in errors.items():
        own_kind, block = _kind(name)
        if own_kind == kind:
            yield block, error


def _kind(name: str) -> tuple[str, int | None]:
    """A parameter's name without its block's number, and that number: None outside the blocks."""
    found = re.search(r"(?:^|\.)(\d+)(?=\.)", name)
    if found is None:
        return name, None
    return name[: found.start(1)] + "*" + name[found.end(1) :], int(found[1])
