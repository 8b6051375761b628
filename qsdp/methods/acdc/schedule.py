"""When AC/DC compresses: pure functions of the step. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ACDCSchedule:
    """The schedule of AC/DC's phases (Peste et al., NeurIPS 2021, arXiv 2106.12379).

    After a dense warm-up, compressed and dense phases of ``phase`` steps alternate; the last dense
    phase and the last compressed one have lengths of their own. Raises ValueError for what cannot
    be.
    """

    steps: int
    """Optimizer steps in all."""
    warmup: int
    phase: int
    last_dense: int
    last_sparse: int

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("phase", 1), ("last_dense", 0), ("last_sparse", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: choose {least} steps or more.")
        if self._between < 0:
            raise ValueError(
                f"warmup, last_dense and last_sparse take {self.steps - self._between} of "
                f"{self.steps} steps: make them shorter or the run longer."
            )

    @classmethod
    def of(
        cls,
        steps: int,
        warmup: int | None = None,
        phase: int | None = None,
        last_dense: int | None = None,
        last_sparse: int | None = None,
    ) -> ACDCSchedule:
        """A schedule in which what is None takes its share of ``steps``: 10, 5, 10 and 15 %.

        Raises ValueError for a ``phase`` where there is no step for one.
        """
        schedule = cls(
            steps=steps,
            warmup=round(steps * 0.1) if warmup is None else warmup,
            phase=max(1, round(steps * 0.05)) if phase is None else phase,
            last_dense=round(steps * 0.1) if last_dense is None else last_dense,
            last_sparse=max(1, round(steps * 0.15)) if last_sparse is None else last_sparse,
        )
        if phase is not None and not schedule._between:
            raise ValueError(
                f"phase is {phase}, but warmup, last_dense and last_sparse take all of {steps} "
                "steps: make one of them shorter, or leave it out."
            )
        return schedule

    def is_compressed(self, step: int) -> bool:
        """Whether optimizer step number ``step``, the first being 0, is taken compressed."""
        if step < self.warmup:
            return False
        if step >= self.steps - self.last_sparse:
            return True
        if step >= self.steps - self.last_sparse - self.last_dense:
            return False
        return (step - self.warmup) // self.phase % 2 == 0

    @property
    def _between(self) -> int:
        """Steps between the warm-up and the last dense phase."""
        return self.steps - self.warmup - self.last_dense - self.last_sparse

    def last_dense_steps(self) -> range:
        """Numbers of the steps of the dense phase that no other dense phase follows."""
        end = self.steps - self.last_sparse
        while end and self.is_compressed(end - 1):
            end -= 1
        begin = end
        while begin and not self.is_compressed(begin - 1):
            begin -= 1
        return range(begin, end)
