"""What becomes of reduces under way, on invented ones: no ranks, no wire."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

import pytest
import torch
from torch import Tensor

from qsdp.comm.differing_gradients import GradientsDiffer
from qsdp.comm.late_reduce import MOST_UNDER_WAY, Late, LateReduce


class Bench:
    """Makes reduces, and notes in which order they are finished and refused."""

    def __init__(self) -> None:
        self.late = Late()
        self.events: list[str] = []

    def begin(self, name: str, group: int, error: Exception | None = None) -> LateReduce:
        """Leave a reduce of two stages under way: 6, to be divided by 2, or ``error``."""
        output = torch.zeros(3)
        reducing = self._reduce(name, output, error)
        slot = self.late.make_room(group)
        assert slot not in {each.slot for each in self.late._under_way()}
        refuse, divide = self.refuser(name), partial(_halve, self.events, name)
        made = LateReduce(group, output, refuse, reducing, slot, divide)
        self.late.leave(made, num_stages=2)
        return made

    def differ(self, name: str, group: int) -> LateReduce:
        """A reduce of which this rank knows at once that ranks reduce different gradients."""
        self.late.make_room(group)
        made = LateReduce(group, torch.zeros(3), self.refuser(name))
        self.late.refuse_at_the_end(made)
        return made

    def refuser(self, name: str) -> Callable[[], None]:
        def refuse() -> None:
            raise RuntimeError(f"{name} is refused")

        return refuse

    def _reduce(
        self, name: str, output: Tensor, error: Exception | None
    ) -> Generator[None, None, int]:
        self.events.append(f"{name} begins")
        yield
        self.events.append(f"{name} goes on")
        yield
        self.events.append(f"{name} ends")
        output.fill_(6)  # before a reduce is known to be wrong
        if error is not None:
            raise error
        return 0


def _halve(events: list[str], name: str, output: Tensor) -> None:
    events.append(f"{name} is divided")
    output /= 2


def _is(output: Tensor, value: float) -> bool:
    return torch.equal(output.nan_to_num(-1), torch.full((3,), -1 if value != value else value))


NAN = float("nan")
LOST = RuntimeError("a rank is lost")


def test_a_reduce_is_nan_until_it_is_finished_and_then_divided_once() -> None:
    bench = Bench()
    one = bench.begin("one", 1)
    assert bench.events == ["one begins", "one goes on"]
    assert _is(one.output, NAN)
    assert bench.late
    bench.late.end()
    assert bench.events[2:] == ["one ends", "one is divided"]
    assert _is(one.output, 3)
    assert not bench.late


def test_room_is_made_by_finishing_the_same_group_or_the_first_of_too_many() -> None:
    bench = Bench()
    one, two = bench.begin("one", 1), bench.begin("two", 2)
    assert bench.late.num_under_way == MOST_UNDER_WAY
    bench.begin("three", 3)
    assert (_is(one.output, 3), _is(two.output, NAN)) == (True, True)
    bench.begin("two again", 2)
    assert _is(two.output, 3)
    assert bench.late.num_under_way == MOST_UNDER_WAY
    bench.late.end()
    bench.begin("five", 5)
    bench.begin("five again", 5)  # of one under way too
    assert bench.events.index("five ends") < bench.events.index("five again begins")
    bench.late.end()
    ends = [event.removesuffix(" ends") for event in bench.events if event.endswith("ends")]
    assert ends == ["one", "two", "three", "two again", "five", "five again"]


def test_what_is_added_to_is_finished_whatever_group_fills_it() -> None:
    bench = Bench()
    one, two = bench.begin("one", 1), bench.begin("two", 2)
    bench.late.make_room(3, adds=True)
    assert (_is(one.output, 3), _is(two.output, 3)) == (True, True)
    assert not bench.late


def test_what_differs_stays_nan_and_is_refused_at_the_end_in_the_order_in_which_it_began() -> None:
    bench = Bench()
    one = bench.begin("one", 1, GradientsDiffer())
    two, three = bench.differ("two", 2), bench.begin("three", 3, GradientsDiffer())
    bench.begin("four", 4)  # makes room: one is known to differ from here on
    assert bench.events.count("one ends") == 1
    assert bench.late.num_under_way == MOST_UNDER_WAY
    with pytest.raises(RuntimeError, match=r"^one is refused$"):
        bench.late.end()
    assert bench.events[-1] == "four is divided"  # all are finished first
    assert all(_is(each.output, NAN) for each in (one, two, three))
    assert not bench.late
    bench.late.end()  # nothing is refused twice


def test_what_is_to_be_refused_takes_no_room() -> None:
    bench = Bench()
    for name in ("one", "two", "three"):
        bench.differ(name, 1)
    four = bench.begin("four", 4)
    assert four.slot == 0
    assert bench.late.num_under_way == 1
    assert _is(four.output, NAN)


@pytest.mark.parametrize("which", ["make_room", "end"])
def test_an_error_comes_out_where_it_is_found_and_leaves_the_others_under_way(which: str) -> None:
    bench = Bench()
    if which == "end":
        bench.differ("zero", 0)
    bench.begin("one", 1, LOST)
    two = bench.begin("two", 2)
    with pytest.raises(RuntimeError) as caught:
        bench.late.make_room(3) if which == "make_room" else bench.late.end()
    assert caught.value is LOST  # and no refusal, which other ranks may not have come to
    assert (bench.late.num_under_way, _is(two.output, NAN)) == (1, True)
    if which == "make_room":
        bench.late.end()  # of the error nothing is left to refuse
        assert _is(two.output, 3)
    bench.late.abandon()
    assert not bench.late


@pytest.mark.parametrize("place", [0, 1])
def test_all_is_abandoned_with_zeros_though_one_is_an_error(place: int) -> None:
    bench = Bench()
    refused = bench.differ("zero", 0)
    errors: list[Exception | None] = [LOST if each == place else None for each in range(2)]
    made = [bench.begin(f"{i}", i + 1, error) for i, error in enumerate(errors)]
    bench.late.abandon()
    assert {"0 ends", "1 ends"} <= set(bench.events)
    assert all(_is(each.output, 0) for each in (refused, *made))
    assert not bench.late
    bench.late.abandon()
    bench.late.end()


def test_nothing_is_refused_when_all_is_abandoned() -> None:
    bench = Bench()
    one = bench.begin("one", 1, GradientsDiffer())
    two = bench.begin("two", 2)
    bench.late.abandon()
    assert (_is(one.output, 0), _is(two.output, 0)) == (True, True)
    assert not bench.late
