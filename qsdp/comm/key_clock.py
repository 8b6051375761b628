"""The step in the random keys: nobody has to advance it by hand."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch
from torch import Tensor

from qsdp.codec.random_numbers import KeyDirection, KeyStage, fold_keys
from qsdp.comm.routes import Route


@lru_cache
def _everyone(num_ranks: int) -> tuple[Tensor, Tensor]:
    """The ends of a gather, which has no receiver of its own."""
    return torch.arange(num_ranks), torch.zeros(1, dtype=torch.int64)


class Clock:
    """The clock of the random keys: counts synchronised backward passes.

    The step advances at the first gather outside a backward pass that follows a reduce. Forward,
    recomputation and backward of one pass therefore share a step, and so do the micro-batches that
    are accumulated before one reduce: all of them see the same decoded weights.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self._reduced = False
        self._occurrences: Counter[int] = Counter()
        self._made: dict[tuple[int, ...], tuple[int, Tensor, tuple[Tensor, Tensor]]] = {}
        self._made_at = seed, self.step

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
        return self._once_a_step(
            self.step, KeyDirection.GATHER, KeyStage.FLAT, 0, _everyone(num_ranks)
        )

    def frozen_keys(self, num_ranks: int) -> Tensor:
        """int64 [ranks], the keys of weights that are sent once for all steps."""
        return self._once_a_step(0, KeyDirection.FROZEN, KeyStage.FLAT, 0, _everyone(num_ranks))

    def kept_keys(self, num_ranks: int) -> Tensor:
        """int64 [ranks], the keys of kept grids, whose epochs say the step: [Note: Changes]."""
        return self._once_a_step(0, KeyDirection.KEPT, KeyStage.FLAT, 0, _everyone(num_ranks))

    def reduce_keys(self, stage: KeyStage, occurrence: int, route: Route) -> Tensor:
        """int64 [payloads], the keys of what a reduce sends along ``route``.

        Senders are global ranks: every replica rounds for itself. Receivers are ranks of the shard
        group, the rows' owners.
        """
        ends = route.senders, route.owners
        return self._once_a_step(self.step, KeyDirection.REDUCE, stage, occurrence, ends)

    def _once_a_step(
        self,
        step: int,
        direction: KeyDirection,
        stage: KeyStage,
        occurrence: int,
        ends: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The keys of payloads of ``ends``, senders and receivers: all groups have the same."""
        now = self.seed, self.step
        if self._made_at != now:
            self._made_at = now
            self._made.clear()
        # Of occurrences the last one's: without an end of the step there may be any number.
        whose = direction, stage, *map(id, ends)
        made_for, keys, _ = self._made.get(whose, (-1, None, None))
        if keys is None or made_for != occurrence:
            keys = fold_keys(self.seed, step, direction, stage, occurrence, *ends)
            self._made[whose] = occurrence, keys, ends  # which keeps their ids theirs
        return keys

    def state_dict(self) -> dict[str, int]:
        """The seed and the step, which checkpoints keep."""
        return {"seed": self.seed, "step": self.step, "reduced": int(self._reduced)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state_dict`` was taken. ``state`` was checked before."""
        self.seed, self.step = state["seed"], state["step"]
        self._reduced = bool(state["reduced"])
        self._occurrences.clear()
