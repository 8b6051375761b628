"""What is read here of a run: lines of metrics.jsonl, and summary.json.

Both may hold more, which whoever trains adds: neither its settings nor its method is known here.
Numbers that were not finite are null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Required, TypedDict


class WireError(TypedDict):
    """Relative errors of one parameter on the wire, None where they were not measured."""

    weight: float | None
    grad: float | None


class StepLine(TypedDict, total=False):
    """A line of metrics.jsonl: one step. What is missing or null was not measured."""

    step: Required[int]
    loss: float | None
    """Loss of the training batch, in nats a token."""
    grad_norm: float | None
    """None for a step that was skipped."""
    skipped_steps: int
    """Skipped steps of the run so far."""
    step_s: float
    tokens_per_s: float
    val_loss: float | None
    val_loss_quantized: float | None
    """Loss with the weights as they come off the wire."""
    pruned: float
    """The fraction of the prunable weights that training has pruned."""
    wire_bytes_sent: float
    """Mean over ranks; of weights and gradients, as the next."""
    wire_bytes_fp32: float
    """What would have been sent in fp32."""
    gather_encode_s: float | None
    """What the parts of the wire take, as the following: mean over ranks."""
    gather_wire_s: float | None
    gather_decode_s: float | None
    reduce_encode_s: float | None
    reduce_wire_s: float | None
    reduce_decode_s: float | None
    wire_errors: dict[str, WireError]
    """By the parameter's name."""


History = Sequence[StepLine]
"""The lines of a run, in the order of its steps."""


class Losses(TypedDict):
    """Losses of one model, in nats a token."""

    val_loss: float | None
    one_shot: dict[str, float | None]
    """Losses after compression in one shot, by target."""


class Zeros(TypedDict):
    """Fractions of weights that are zero."""

    prunable: float
    model: float


class WireSummary(TypedDict):
    """What a rank sends: a step, on the mean over ranks and steps."""

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


def number(line: StepLine, name: str) -> float | None:
    """A metric of one step; None where it is missing, or something else has been written there."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else None


def numbers(history: History, name: str) -> list[float]:
    """A metric of the steps that have it."""
    found = (number(line, name) for line in history)
    return [value for value in found if value is not None]


def losses_beside(summary: Summary) -> dict[str, float]:
    """The losses of models that a run has kept beside its own.

    It is ``dense twin`` for the number called ``dense_twin_val_loss``.
    """
    ending = "_val_loss"
    return {
        name.removesuffix(ending).replace("_", " "): loss
        for name, loss in summary.items()
        if name.endswith(ending) and isinstance(loss, int | float)
    }
