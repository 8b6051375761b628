"""The schedules of AC/DC and gradual pruning."""

from __future__ import annotations

from typing import Any

import pytest

from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.gmp.schedule import GMPSchedule
from tests.support.masked_reference import acdc_phase, cubic
from tests.support.masked_runs import GRADUAL, PHASES, STEPS


@pytest.mark.parametrize(
    ("steps", "options"),
    [(24, PHASES), (10, dict.fromkeys(PHASES, 1)), (7, {**PHASES, "warmup": 0, "last_dense": 0})],
    ids=str,
)
def test_phases_follow_the_formula(steps: int, options: dict[str, int]) -> None:
    schedule = ACDCSchedule.of(steps, **options)
    for step in range(steps + 3):
        assert schedule.is_compressed(step) == acdc_phase(step, steps, *options.values())
    dense = [s for s in range(steps) if not schedule.is_compressed(s)]
    last = [*schedule.last_dense_steps()]
    assert last == (dense[-len(last) :] if dense else [])
    assert not dense or last[0] == 0 or schedule.is_compressed(last[0] - 1)


@pytest.mark.parametrize("steps", [100, 1000, 1600])
def test_phases_have_the_papers_shares_by_default(steps: int) -> None:
    schedule = ACDCSchedule.of(steps)
    shares = [steps // 10, steps // 20, steps // 10, steps * 15 // 100]
    for step in range(steps):
        assert schedule.is_compressed(step) == acdc_phase(step, steps, *shares)


def test_the_cubic_schedule_and_its_cycles() -> None:
    found = {done: GRADUAL.sparsity_after(done) for done in range(STEPS + 1)}
    places = {2: 0, 7: 1 / 3, 12: 2 / 3, 17: 1}
    for done, sparsity in found.items():
        if done in places:
            assert sparsity == pytest.approx(cubic(places[done], 0.9, 0.3), abs=1e-12)
        else:
            assert sparsity is None
    assert [GRADUAL.is_pruned(step) for step in range(4)] == [False, False, True, True]
    begins = [0, 2, 7, 12, 17]
    for step in range(STEPS):
        begin = max(b for b in begins if b <= step)
        end = min([b for b in begins if b > step], default=STEPS)
        assert GRADUAL.cycle(step) == (step - begin, end - begin)


@pytest.mark.parametrize("call", ["acdc", "gmp"])
def test_schedules_that_cannot_be_are_refused(call: str) -> None:
    cases: list[tuple[dict[str, Any], str]]
    if call == "acdc":
        cases = [
            ({"warmup": -1}, "warmup is -1: choose 0"),
            ({"phase": 0}, "phase is 0: choose 1"),
            ({"last_sparse": 0}, "last_sparse is 0: choose 1"),
            ({"warmup": 90}, "take 115 of 100 steps"),
            ({"warmup": 75, "phase": 5}, "phase is 5, but"),
        ]
        made: Any = ACDCSchedule.of
    else:
        cases = [
            ({"sparsity": 1.0}, "from 0.5 to 1.0"),
            ({"sparsity": -0.5}, "from -0.5 to -0.5"),
            ({"sparsity": 0.9, "start": 0}, "from step 0"),
            ({"sparsity": 0.9, "every": 0}, "every 0"),
            ({"sparsity": 0.9, "end": 101}, "to 101"),
            ({"sparsity": 0.9, "start": 9, "end": 9, "every": 5}, "every is 5, but the pruning of"),
            ({"sparsity": 0.9, "start": 9, "end": 12, "initial": 0.1}, "initial is 0.1, but"),
        ]
        made = GMPSchedule.of
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            made(100, **options)
