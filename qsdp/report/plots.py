"""The plots of a run: loss, one-shot pruning, bytes and time on the wire, step time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qsdp.common.atomic_files import discard_unfinished, replacing
from qsdp.common.printing import print_error
from qsdp.common.user_errors import quoted
from qsdp.report.error_plot import draw_errors
from qsdp.report.step_line import History, StepLine, step_metric, step_metrics
from qsdp.report.summary_json import Losses, Summary
from qsdp.sparsity.compression_target import Compression

T = TypeVar("T")

PLOT_NAMES = ("loss", "one_shot", "wire", "step_time", "wire_time", "pruned", "errors")

# What a step's time is shown as, from the bottom up: name of the metric, label, colour.
_WIRE_TIME = (
    ("gather_encode_s", "weights: encode", "#9ecae1"),
    ("gather_wire_s", "weights: wire", "#4292c6"),
    ("gather_decode_s", "weights: decode", "#08519c"),
    ("reduce_encode_s", "gradients: encode", "#fdd0a2"),
    ("reduce_wire_s", "gradients: wire", "#fd8d3c"),
    ("reduce_decode_s", "gradients: decode", "#a63603"),
)


def write_plots(folder: Path, history: History, summary: Summary) -> list[Path]:
    """Write the plots as PNG files into ``folder``. Returns the paths, none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    draw: dict[str, Callable[[Any], None]] = {
        "loss": lambda axes: _plot_loss(axes, history, summary),
        "one_shot": lambda axes: _plot_one_shot(axes, summary),
        "wire": lambda axes: _plot_wire(axes, history),
        "step_time": lambda axes: _plot_step_time(axes, history),
    }
    if _timed(history):
        draw["wire_time"] = lambda axes: _plot_wire_time(axes, history)
    if any(line.get("pruned") for line in history):
        draw["pruned"] = lambda axes: _plot_pruned(axes, history)
    if not any(line.get("wire_bytes_sent") for line in history):
        del draw["wire"]  # a world of one
    paths = []
    for name, plot in draw.items():
        paths.append(folder / f"{name}.png")
        _save(paths[-1], plot)
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    if draw_errors(figure, history):
        paths.append(folder / "errors.png")
        save_png(figure, paths[-1])
    return paths


def may_fail(what: str, draw: Callable[[], T]) -> T | None:
    """What ``draw`` returns; None, and a line on standard error, if it fails in whatever way.

    A picture of results is none of them.
    """
    try:
        return draw()
    except Exception as error:
        told = quoted(f"{type(error).__name__}: {error}")
        print_error(f"warning: {what} cannot be drawn, or not as a whole ({told}).")
        return None


def remove_stale(folder: Path, drawn: list[Path]) -> list[str]:
    """Delete what ``write_plots`` drew of an earlier state of the run and not now.

    It may be whole, or killed in the middle. Returns the names of whole ones.
    """
    every = [folder / f"{name}.png" for name in PLOT_NAMES]
    others = [path for path in every if path not in drawn]
    for path in others:
        discard_unfinished(path)
    stale = [path for path in others if path.exists()]
    for path in stale:
        path.unlink()
    return [path.name for path in stale]


def write_target_plot(path: Path, losses: Losses, split: str) -> bool:
    """Write loss and perplexity over targets as a PNG file; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")

    def draw(axes: Any) -> None:
        _plot_one_shot(axes, losses)
        axes.set_ylabel(f"{split} loss, nats a token")
        known = [loss for loss in (losses["val_loss"], *losses["one_shot"].values()) if loss]
        if known and max(known) < 20:  # a diverged model's perplexity is beyond all axes
            # matplotlib tries the inverse at 0 too.
            twin = axes.secondary_yaxis("right", functions=(np.exp, lambda p: np.log(p + 1e-9)))
            twin.set_ylabel("perplexity")

    _save(path, draw)
    return True


def _save(path: Path, draw: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save_png(figure, path)


def save_png(figure: Any, path: Path) -> None:
    """Replace the file ``path`` by a picture of the ``figure``, all or nothing."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _plot_loss(axes: Any, history: History, summary: Summary) -> None:
    steps, losses = _steps_and_values(history, "loss")
    last: StepLine = {
        "step": summary["steps"],
        "val_loss": summary["val_loss"],
        "val_loss_quantized": summary["val_loss_quantized"],
    }
    history = [*history, last]
    axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(steps, list(_smoothed(losses)), color="C0", label="training, smoothed")
    skipped = [line["step"] for line in history if line.get("grad_norm", 0.0) is None]
    if skipped:
        edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(skipped, [0.0] * len(skipped), "|", color="C3", label="skipped", **edge)
    # The two may lie on each other: both must be seen.
    for name, label, style in (
        ("val_loss", "validation", {"color": "C1", "marker": "o", "markersize": 4}),
        (
            "val_loss_quantized",
            "validation off the wire",
            {"color": "C2", "marker": "o", "markersize": 7, "fillstyle": "none", "ls": "--"},
        ),
    ):
        points = _steps_and_values(history, name)
        if points[0]:
            axes.plot(*points, label=label, **style)
    _label_steps(axes)
    axes.set(ylabel="nats a token", title="Loss")
    axes.legend()


def _plot_one_shot(axes: Any, summary: Losses) -> None:
    """Draw plain fractions as a curve; other targets as marks at what they prune, by name."""
    losses = {Compression(): summary["val_loss"]}
    losses |= {Compression.of(target): loss for target, loss in summary["one_shot"].items()}
    found = [(target, loss) for target, loss in losses.items() if loss is not None]
    plain = [(100 * t.sparsity, loss) for t, loss in found if t == Compression(sparsity=t.sparsity)]
    axes.plot([s for s, _ in plain], [loss for _, loss in plain], "o-")
    for target, loss in found:
        if target != Compression(sparsity=target.sparsity):
            point = (100 * target.fraction, loss)
            axes.plot(*point, "s", color="C1")
            axes.annotate(f" {target}", point, fontsize="small")
    axes.set(
        xlabel="block weights pruned in one shot, %",
        ylabel="validation loss, nats a token",
        title="Loss after one-shot compression",
    )


def _plot_pruned(axes: Any, history: History) -> None:
    steps, fractions = _steps_and_values(history, "pruned")
    axes.plot(steps, [100 * f for f in fractions], ".", markersize=2)
    axes.set_ylim(-2, 102)
    _label_steps(axes)
    axes.set(ylabel="%", title="Prunable weights pruned in training")


def _plot_wire(axes: Any, history: History) -> None:
    for name, label in (("wire_bytes_sent", "sent"), ("wire_bytes_fp32", "the same in fp32")):
        steps, counts = _steps_and_values(history, name)
        axes.plot(steps, [count / 1e6 for count in counts], label=label)
    axes.set_ylim(bottom=0)
    _label_steps(axes)
    axes.set(ylabel="MB a rank and step", title="Weights and gradients on the wire")
    axes.legend()


def _plot_step_time(axes: Any, history: History) -> None:
    steps, seconds = _steps_and_values(history, "step_s")
    milliseconds = [1e3 * s for s in seconds]
    axes.plot(steps, milliseconds, alpha=0.3, linewidth=0.8)
    axes.plot(steps, list(_smoothed(milliseconds)), color="C0")
    if milliseconds:
        axes.set_ylim(0, _ceiling(milliseconds))
    _label_steps(axes)
    axes.set(ylabel="ms", title="Time a step")


def _label_steps(axes: Any) -> None:
    """Label whole numbers only, in a short run too."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")


def _plot_wire_time(axes: Any, history: History) -> None:
    lines = _timed(history)
    steps = [line["step"] for line in lines]
    parts = [[1e3 * taken for taken in step_metrics(lines, name)] for name, _, _ in _WIRE_TIME]
    # On a GPU the wire may overlap with what the step computes, so that nothing seems left.
    rest = [
        max(0.0, 1e3 * line["step_s"] - sum(times))
        for line, times in zip(lines, zip(*parts, strict=True), strict=True)
    ]
    labels = [*(label for _, label, _ in _WIRE_TIME), "the rest of the step"]
    colors = [*(color for _, _, color in _WIRE_TIME), "#d9d9d9"]
    areas = [list(_smoothed(times)) for times in (*parts, rest)]
    axes.stackplot(steps, *areas, labels=labels, colors=colors)
    axes.set_ylim(0, _ceiling([sum(times) for times in zip(*areas, strict=True)]))
    axes.set(xlabel="step", ylabel="ms", title="Where the time of a step goes, smoothed")
    # In the order of the areas, which are stacked from the bottom.
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], names[::-1], fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)
    )


def _timed(history: History) -> History:
    """The steps whose time on the wire is known."""
    names = [name for name, _, _ in _WIRE_TIME]
    return [line for line in history if all(step_metric(line, n) is not None for n in names)]


def _ceiling(values: list[float]) -> float:
    """Top of an axis: a first step, or one beside a busy neighbour, must not flatten all others."""
    return 1.5 * sorted(values)[int(0.98 * (len(values) - 1))]


def _steps_and_values(history: History, name: str) -> tuple[list[int], list[float]]:
    steps = [line["step"] for line in history if step_metric(line, name) is not None]
    return steps, step_metrics(history, name)


def _smoothed(values: list[float], decay: float = 0.9) -> Iterator[float]:
    """An exponential mean, without the bias of its start."""
    mean = 0.0
    for count, value in zip(itertools.count(1), values, strict=False):
        mean = decay * mean + (1 - decay) * value
        yield mean / (1 - decay**count)
