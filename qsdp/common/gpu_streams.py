"""What one stream of a GPU writes and another uses."""

from __future__ import annotations

import torch
from torch import Tensor


def reads_on_this_stream(buffer: Tensor) -> None:
    """Let the allocator know that the current stream uses ``buffer``, which may have been allocated
    for another one, so that its memory is not given away while it is still in use."""
    if buffer.device.type != "cpu":
        buffer.record_stream(torch.accelerator.current_stream(buffer.device))


def written_on_this_stream(device: torch.device) -> torch.Event | None:
    """What another stream must wait for before it reads what the current one of ``device`` has been
    given to write; None on CPUs."""
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return event
