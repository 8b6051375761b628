"""The step in the random keys: nobody has to advance it by hand."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from qsdp.codec.random_numbers import Direction, Stage, fold_all


class Clock:
    """Counts synchronised backward passes.

    The step advances at the first gather outside a backward pass that follows a reduce. Forward,
    recomputation and backward of one pass therefore share a step, and so do the micro-batches that
    are accumulated before one reduce: all of them see the same decoded weights.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self._reduced = False
        self._occurrences: Counter[int] = Counter()
        self._made: dict[Direction, tuple[tuple[int, int, int], Tensor]] = {}

    @property
    def next_step(self) -> int:
        """The step of a forward pass that began now."""
        return self.step + self._reduced

    def before_forward(self) -> None:
        """Advance the step if the gather that follows is the first after a reduce."""
        if self._reduced:
            self.step += 1
            self._reduced = False
            self._occurrences.clear()

    def before_reduce(self, group: int) -> int:
        """How many reduces the group had in this step: reduces differ even within a step."""
        self._reduced = True
        self._occurrences[group] += 1
        return self._occurrences[group] - 1

    def rewind(self) -> None:
        """Forget the reduces of a backward pass that was cut short: the step is taken again."""
        self._reduced = False
        self._occurrences.clear()

    def gather_keys(self, num_ranks: int) -> Tensor:
        """int64 [ranks], by the rank in the shard group: replicas decode the same weights."""
        return self._keys_of_gathers(self.step, Direction.GATHER, num_ranks)

    def frozen_keys(self, num_ranks: int) -> Tensor:
        """Of weights that are sent once for all steps."""
        return self._keys_of_gathers(0, Direction.FROZEN, num_ranks)

    def reduce_keys(
        self, stage: Stage, occurrence: int, senders: Tensor, receivers: Tensor
    ) -> Tensor:
        """int64 [payloads]. ``senders``, int64 [payloads] or [1], are global ranks: every replica
        rounds for itself. ``receivers`` are the ranks in the shard group of the rows' owners."""
        seed, step = self.seed, self.step
        return fold_all(seed, step, Direction.REDUCE, stage, occurrence, senders, receivers)

    def _keys_of_gathers(self, step: int, direction: Direction, num_ranks: int) -> Tensor:
        # All groups have the same in a step.
        now = (self.seed, step, num_ranks)
        made_for, keys = self._made.get(direction, (None, None))
        if keys is None or made_for != now:
            ranks = torch.arange(num_ranks)
            nobody = torch.zeros(1, dtype=torch.int64)
            keys = fold_all(self.seed, step, direction, Stage.FLAT, 0, ranks, nobody)
            self._made[direction] = now, keys
        return keys

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "step": self.step, "reduced": int(self._reduced)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken. ``state`` was checked before."""
        self.seed, self.step = state["seed"], state["step"]
        self._reduced = bool(state["reduced"])
        self._occurrences.clear()
