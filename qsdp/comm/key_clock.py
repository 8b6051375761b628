"""The step in the random keys: nobody has to advance it by hand."""

from __future__ import annotations

from collections import Counter

from qsdp.codec.random_numbers import Direction, Key, Stage


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

    def gather_key(self, sender: int) -> int:
        """``sender`` is the rank in the shard group: replicas decode the same weights."""
        return Key(self.seed, self.step, Direction.GATHER, Stage.FLAT, 0, sender).fold()

    def frozen_key(self, sender: int) -> int:
        """Of weights that are sent once for all steps."""
        return Key(self.seed, 0, Direction.FROZEN, Stage.FLAT, 0, sender).fold()

    def reduce_key(self, stage: Stage, occurrence: int, sender: int, receiver: int) -> int:
        """``sender`` is the global rank: every replica rounds for itself. ``receiver`` is the rank
        in the shard group of the row's owner."""
        key = Key(self.seed, self.step, Direction.REDUCE, stage, occurrence, sender, receiver)
        return key.fold()

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "step": self.step, "reduced": int(self._reduced)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken. ``state`` was checked before."""
        self.seed, self.step = state["seed"], state["step"]
        self._reduced = bool(state["reduced"])
        self._occurrences.clear()
