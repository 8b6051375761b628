"""When gradual magnitude pruning compresses: pure functions of the step. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GMPSchedule:
    """The cubic schedule of gradual magnitude pruning (arXiv 1710.01878, 2210.06384).

    Weights are pruned after steps start, start + every, ... up to end, from ``initial`` to
    ``sparsity``. Raises ValueError for what cannot be.
    """

    steps: int
    sparsity: float
    initial: float
    start: int
    every: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.sparsity < 1:
            raise ValueError(
                f"gradual pruning goes from {self.initial} to {self.sparsity}: choose fractions "
                "from 0 to below 1, the first not above the second."
            )
        if not 1 <= self.start <= self.end <= self.steps or self.every < 1:
            raise ValueError(
                f"gradual pruning from step {self.start} to {self.end}, every {self.every}, does "
                f"not fit into {self.steps} steps: choose 1 <= start <= end and every from 1."
            )

    @classmethod
    def of(
        cls,
        steps: int,
        sparsity: float,
        initial: float | None = None,
        start: int | None = None,
        every: int | None = None,
        end: int | None = None,
    ) -> GMPSchedule:
        """A schedule where what is None takes its share of ``steps``: from 10 % to 75 %, every 5 %.

        ``initial`` is then 0.5, or ``sparsity`` if that is less. Raises ValueError for ``initial``
        or ``every`` where there is one pruning only.
        """
        start = max(1, round(steps * 0.1)) if start is None else start
        schedule = cls(
            steps=steps,
            sparsity=sparsity,
            initial=min(0.5, sparsity) if initial is None else initial,
            start=start,
            every=max(1, round(steps * 0.05)) if every is None else every,
            end=max(start, round(steps * 0.75)) if end is None else end,
        )
        for name, value, is_heeded in (
            ("initial", initial, schedule._last > 0),
            ("every", every, schedule.end > start),
        ):
            if value is not None and not is_heeded:
                raise ValueError(
                    f"{name} is {value}, but the pruning of step {start} is the last one: choose a "
                    "later end or more prunings, or leave it out."
                )
        return schedule

    def sparsity_after(self, steps_done: int) -> float | None:
        """The fraction pruned when ``steps_done`` steps are done; None where nothing changes."""
        place, rest = divmod(steps_done - self.start, self.every)
        return None if rest or not 0 <= place <= self._last else self.sparsity_at(steps_done)

    def sparsity_at(self, steps_done: int) -> float:
        """The fraction that has been pruned when ``steps_done`` steps are done."""
        if steps_done < self.start:
            return 0.0
        place = min((steps_done - self.start) // self.every, self._last)
        share = 1 - place / self._last if self._last else 0.0
        return self.sparsity + (self.initial - self.sparsity) * share**3

    def is_pruned(self, step: int) -> bool:
        """Whether optimizer step number ``step``, the first being 0, is taken with a mask."""
        return step >= self.start

    def cycle(self, step: int) -> tuple[int, int]:
        """Where ``step`` stands between two prunings, and how many steps lie between them.

        The learning rate starts anew with each.
        """
        if step < self.start:
            return step, self.start
        begin = self.start + min((step - self.start) // self.every, self._last) * self.every
        is_last = begin == self.start + self._last * self.every
        return step - begin, (self.steps - begin if is_last else self.every)

    @property
    def _last(self) -> int:
        """The number of the last pruning, the first being 0."""
        return (self.end - self.start) // self.every
