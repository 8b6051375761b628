"""summary.json, in which a run tells its outcome, and what is read of it.

It may hold more, which whoever trains adds: neither settings nor method are known here. Numbers
that were not finite are null.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict


class Losses(TypedDict):
    """Of summary.json: losses of one model, in nats a token."""

    val_loss: float | None
    one_shot: dict[str, float | None]
    """Losses after compression in one shot, by target."""


class Zeros(TypedDict):
    """Of summary.json: the fractions of weights that are zero."""

    prunable: float
    model: float


class WireSummary(TypedDict):
    """Of summary.json: what a rank sends a step, on the mean over ranks and steps."""

    sent_bytes_per_step: float
    fp32_bytes_per_step: float
    other_bytes_per_step: float
    inter_node_bytes_per_step: dict[str, float | None]
    """By direction, ``gather`` and ``reduce``."""
    seconds_per_step: dict[str, float | None]
    """By the names that a ``StepLine`` has for them; None where nothing was timed."""
    source: str
    """Who counted."""


class Summary(Losses):
    """The contents of summary.json.

    Each further key NAME_val_loss is the loss of a model that was kept beside the trained one, or
    null: see ``losses_beside``.
    """

    val_loss_quantized: float | None
    sparsity: Zeros
    steps: int
    skipped_steps: int
    steps_measured: int
    """The steps that times and bytes are of."""
    step_s_median: float | None
    tokens_per_s: float | None
    mfu: float | None
    wire: WireSummary
    sample: str | None


def losses_beside(summary: Summary) -> dict[str, float]:
    """What summary.json says of the losses of models that a run has kept beside its own.

    It is ``dense twin`` for the number called ``dense_twin_val_loss``.
    """
    ending = "_val_loss"
    return {
        name.removesuffix(ending).replace("_", " "): loss
        for name, loss in summary.items()
        if name.endswith(ending) and isinstance(loss, int | float)
    }


def read_summary(out: Path) -> dict[str, Any]:
    """What summary.json says; nothing where there is none that can be read."""
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}
