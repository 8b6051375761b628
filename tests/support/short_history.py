"""The metrics and the summary of a short run."""

from __future__ import annotations

from typing import Any


def short_history(num_steps: int, wire_bytes: float) -> list[dict[str, Any]]:
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


def short_summary(loss: float | None) -> dict[str, Any]:
    one_shot = {"0.5": loss, "0.9": None}
    return {"steps": 3, "val_loss": loss, "val_loss_quantized": loss, "one_shot": one_shot}
