"""What FSDP2 asks of a collective of one's own besides itself: its flat buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class CommBuffers:
    """Flat comm buffers for FSDP2."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer for FSDP2, uninitialised."""
        return torch.empty(*size, dtype=dtype, device=device)
