"""Tokens to batches: random windows to train on, consecutive ones to validate on.

Which windows a rank gets is a pure function of numbers: a resumed run needs no state, and a run on
more or fewer ranks sees the same data as long as the global batch is equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from qsdp.common.splitmix64 import GOLDEN_GAMMA, finalize
from qsdp.data.token_shards import Tokens


class Batches:
    """Training batches: windows of seq_len + 1 tokens at random places, drawn with replacement.

    Sample i of micro-batch ``micro`` of a step has the global number
    g = ((step * grad_accum + micro) * world_size + rank) * batch_size + i,
    and (seed, g) alone places its window.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        grad_accum: int = 1,
    ) -> None:
        """Check the numbers, and look at the split.

        Args:
            tokens: The training split.
            batch_size: Sequences a rank a micro-batch.
            seq_len: Tokens a sequence.
            seed: 0 to 2^64 - 1.
            rank, world_size: Which of how many processes this is.
            grad_accum: Micro-batches a step.

        Raises:
            ValueError: A number is out of range, the split has not one whole window, or a step
                takes more tokens than the split has.
        """
        _check_sizes(tokens, batch_size, seq_len, "training")
        _check_place(rank, world_size)
        if grad_accum < 1:
            raise ValueError(f"grad_accum is {grad_accum}: choose 1 or more.")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"the seed is {seed}: choose a number from 0 to 2^64 - 1.")
        step_tokens = batch_size * seq_len * world_size * grad_accum
        if step_tokens > len(tokens):
            raise ValueError(
                f"a step of {grad_accum} x {world_size} x {batch_size} sequences of {seq_len} "
                f"tokens takes {step_tokens} tokens, but the training split has only "
                f"{len(tokens)}: choose a smaller batch size or more data."
            )
        self._tokens = tokens
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._rank = rank
        self._world_size = world_size
        self._grad_accum = grad_accum
        self._key = finalize(np.array([seed], dtype=np.uint64))

    def get(self, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
        """(inputs_BT, targets_BT) of one micro-batch, int64 on the CPU; targets are one ahead."""
        assert 0 <= micro < self._grad_accum
        part = (step * self._grad_accum + micro) * self._world_size + self._rank
        first = part * self._batch_size
        numbers = np.arange(first, first + self._batch_size, dtype=np.uint64)
        # The remainder's bias is below num_starts / 2^64.
        drawn = finalize(self._key + numbers * np.uint64(GOLDEN_GAMMA))
        starts = drawn % np.uint64(len(self._tokens) - self._seq_len)
        return _windows(self._tokens, [int(start) for start in starts], self._seq_len)


def eval_batches(
    tokens: Tokens,
    batch_size: int,
    seq_len: int,
    num_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Validation batches: windows that follow each other from the split's start up to its end.

    Every rank yields the same number of batches, at most ``num_batches`` (None: all of the split),
    for their forwards are collective. Where the split ends inside the last ones, a rank's batch is
    shorter, or is one sequence that counts nothing. The windows seen depend only on num_batches *
    batch_size * world_size.

    Yields:
        (inputs_BT, targets_BT, num_tokens): int64 on the CPU, and how many targets count, 0 or all
        of them. The exact mean is the sum over batches and ranks of num_tokens * loss, divided by
        the sum of num_tokens.

    Raises:
        ValueError: At the call, a number is out of range or the split has not one whole window.
    """
    _check_sizes(tokens, batch_size, seq_len, "validation")
    _check_place(rank, world_size)
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches is {num_batches}: choose 1 or more, or None for all.")
    num_windows = (len(tokens) - 1) // seq_len
    global_batch = batch_size * world_size
    num_all = -(-num_windows // global_batch)
    num_yielded = num_all if num_batches is None else min(num_batches, num_all)

    def batches() -> Iterator[tuple[Tensor, Tensor, int]]:
        for batch in range(num_yielded):
            first = batch * global_batch + rank * batch_size
            windows = range(first, min(first + batch_size, num_windows))
            starts = [window * seq_len for window in windows] or [0]
            yield *_windows(tokens, starts, seq_len), len(windows) * seq_len

    return batches()


def _windows(tokens: Tokens, starts: list[int], seq_len: int) -> tuple[Tensor, Tensor]:
    rows = np.empty((len(starts), seq_len + 1), dtype=np.int64)
    for row, start in zip(rows, starts, strict=True):
        row[:] = tokens[start : start + seq_len + 1]
    ids = torch.from_numpy(rows)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _check_place(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(
            f"the rank is {rank} of {world_size}: choose one from 0 to below the number of ranks."
        )


def _check_sizes(tokens: Tokens, batch_size: int, seq_len: int, split: str) -> None:
    if batch_size < 1 or seq_len < 1:
        raise ValueError(
            f"a batch of {batch_size} sequences of {seq_len} tokens is empty: choose at least 1 "
            "of each."
        )
    if len(tokens) <= seq_len:
        raise ValueError(
            f"the {split} split has {len(tokens)} tokens, but one sequence of {seq_len} and its "
            f"targets need {seq_len + 1}: choose a shorter seq_len or more data."
        )
