"""What may be measured of a machine and its link, in numbers that are invented."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qsdp.train.auto.cost_model import STOCK, Measured, ModelledGroup, Transfer

VALUES = 1_500_000  # of a block's shard
SLOW, FAST, LOOPBACK = 12.5e6, 1.25e9, 20e9  # bytes a second


def transfer(bytes_per_s: float, latency_s: float = 1e-4, busy: float = 0.1) -> Transfer:
    return Transfer(latency_s=latency_s, bytes_per_s=bytes_per_s, busy=busy, num_bytes=1 << 20)


def group(values: int, forward_s: float, *, is_bf16: bool = False) -> ModelledGroup:
    sizes = {8: int(1.01 * values), 4: int(0.57 * values)}
    return ModelledGroup(
        values=values,
        gather_bytes={STOCK: (2 if is_bf16 else 4) * values, **sizes},
        reduce_bytes={STOCK: 4 * values, **sizes},
        local_bytes=sizes[8],
        forward_s=forward_s,
        backward_s=2 * forward_s,
    )


def measured(bytes_per_s: float, latency_s: float = 1e-4, **changes: Any) -> Measured:
    """A GPT of 19 million parameters on two ranks."""
    own = transfer(bytes_per_s, latency_s)
    return replace(
        Measured(
            num_ranks=2,
            ranks_per_node=1,
            has_streams=False,
            num_blocks=6,
            passes=1,
            micro_batches=1,
            root=group(130_000, 0.01),
            block=group(VALUES, 0.035),
            free_bytes=None,
            optimizer_s=0.02,
            encode_s={8: 3e-10, 4: 8e-10},
            decode_s={8: 3e-10, 4: 1e-9},
            stock_gather=own,
            stock_reduce=transfer(bytes_per_s / 2, latency_s),
            gather=own,
            reduce=own,
        ),
        **changes,
    )
