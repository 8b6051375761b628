"""What is read of a line of metrics.jsonl, which is one step.

It may hold more, which whoever trains adds: neither settings nor method are known here. Numbers
that were not finite are null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Required, TypedDict


class WireError(TypedDict):
    """Of a step line: relative errors of one parameter on the wire, None where not measured."""

    weight: float | None
    grad: float | None


class StepLine(TypedDict, total=False):
    """A step line of metrics.jsonl. What is missing or null was not measured."""

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


def step_metric(line: StepLine, name: str) -> float | None:
    """A metric of one step line; None where it is missing, or something else was written there."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else None


def step_metrics(history: History, name: str) -> list[float]:
    """A metric of those step lines that have it."""
    found = (step_metric(line, name) for line in history)
    return [value for value in found if value is not None]
