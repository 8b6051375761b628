"""What one stream of a GPU writes and another uses."""

from __future__ import annotations

import torch
from torch import Tensor


def reads_on_this_stream(buffer: Tensor) -> None:
    """Let the allocator know that the current stream uses ``buffer``.

    It may have been allocated for another stream: its memory is not given away while it is in use.
    """
    if buffer.device.type != "cpu":
        buffer.record_stream(torch.accelerator.current_stream(buffer.device))


def written_on_this_stream(device: torch.device) -> torch.Event | None:
    """What another stream waits for before it reads what this one of ``device`` is to write.

    None on CPUs.
    """
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return event


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, without waiting for what that GPU's streams still compute."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
