"""The random numbers of the codec: pure functions of a key, the same on every machine.

[Note: Keys] A ``RandomKey`` names one payload; it is folded into 64 bits. Within the payload the
generator's 128-bit counter is (block, parameter, group): value or bucket number i takes 16-bit half
word i % 8 of block i // 8. Where a bucket has an epoch, the step at which its grid was drawn, this
is in the block number's high 32 bits. No generator state exists, so resume and replay are exact.

Philox4x32-7 is the generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3" (SC 2011), with seven rounds, the fewest that pass BigCrush.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qsdp.common.splitmix64 import GOLDEN_GAMMA, MASK, finalize

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7
_MASK32 = 0xFFFFFFFF


class KeyDirection(IntEnum):
    """A word of the key of random numbers: what the payload travels for."""

    GATHER = 0
    REDUCE = 1
    FROZEN = 2
    """The gather of weights that are sent once for all steps."""
    KEPT = 3
    """Grids that are kept: their numbers depend on epochs in place of the step."""


class KeyStage(IntEnum):
    """A word of the key of random numbers: among which ranks the payload of a reduce travels.

    A topology is made of stages: [Note: Stages] in ``comm/topology.py``.
    """

    FLAT = 0
    """All of the shard group at once.
    Gathers have this word in every topology: a shard is coded once, and handed on as it is.
    """
    LOCAL = 1
    """Inside a node."""
    ACROSS = 2
    """Between nodes."""
    REPLICAS = 3
    """Between replicas."""


class RandomKey(NamedTuple):
    """What the random numbers of one payload depend on, besides the parameter and its group."""

    seed: int
    step: int
    direction: KeyDirection
    stage: KeyStage
    occurrence: int  # how many payloads of this kind the group sent before in this step
    sender: int  # a gather: rank in the shard group; a reduce: global rank
    receiver: int = 0  # a reduce: the destination's rank in the group

    def fold(self) -> int:
        """The 64-bit key of the generator, as a signed integer: field after field is mixed in."""
        state = _fold_fields(self)
        return state - (state >> 63 << 64)


def fold_keys(
    seed: int,
    step: int,
    direction: KeyDirection,
    stage: KeyStage,
    occurrence: int,
    senders: Tensor,
    receivers: Tensor,
) -> Tensor:
    """The folded keys of random numbers, int64 [n], of payloads that differ in their ends alone.

    These are int64 [n] or [1] each.
    """
    state: Any = _fold_fields([seed, step, direction, stage, occurrence])
    for end in (senders, receivers):
        state = finalize((state ^ end.numpy().view(np.uint64)) + GOLDEN_GAMMA & MASK)
    return torch.from_numpy(state.view(np.int64))


def _fold_fields(fields: Iterable[int]) -> int:
    state = 0
    for field in fields:
        state = finalize((state ^ field) + GOLDEN_GAMMA & MASK)
    return state


def philox(block: Tensor, parameter: int, group: int, key: int) -> Tensor:
    """The generator of the random numbers: Philox4x32-7 of ``block`` (int64 [N]).

    Returns 32-bit words in an int64 tensor [N, 4].
    """
    c0, c1 = block & _MASK32, block >> 32 & _MASK32
    c2, c3 = torch.full_like(block, parameter & _MASK32), torch.full_like(block, group & _MASK32)
    k0, k1 = key & _MASK32, key >> 32 & _MASK32
    for _ in range(ROUNDS):
        # int64 products wrap, yet their 64 bits are those of the unsigned product.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32 & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = k0 + WEYL[0] & _MASK32, k1 + WEYL[1] & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=1)


def uniform(
    num: int,
    parameter: int,
    group: int,
    key: int,
    device: torch.device,
    epochs: Tensor | None = None,
) -> Tensor:
    """``num`` random numbers in (-1/2, 1/2), fp32 [num]: (k + 1/2) / 2**16 - 1/2, k of 16 bits.

    ``epochs``: int32 [blocks], the high words of the blocks' numbers.
    """
    blocks = torch.arange(-(-num // 8), device=device)
    if epochs is not None:
        blocks = blocks | epochs.long() << 32
    words = philox(blocks, parameter, group, key)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()[:num]
    return (halves.to(torch.float32) + 0.5) / 65536 - 0.5
