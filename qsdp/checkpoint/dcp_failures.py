"""How a failure of torch.distributed.checkpoint (DCP) is told."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException

from qsdp.checkpoint.plain_values import Refused
from qsdp.common.user_errors import quoted


def raise_refused(error: CheckpointException) -> None:
    """Raise the first ``Refused`` among the failures of DCP on all ranks, if there is one."""
    for first, _ in error.failures.values():
        if isinstance(first, Refused):
            raise first from None


def first_failure(error: CheckpointException) -> str:
    """The failure of DCP on the first rank that had one, on one line."""
    first = next(iter(error.failures.values()))[0]
    return quoted(f"{type(first).__name__}: {first}", 300)
