"""One rank has other gradients than its peers, or waits at once for what they leave under way."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests_distributed.support.late import (
    Job,
    Way,
    differing,
    num_under_way,
    optimize_inside,
    wait_at_once,
)
from tests_distributed.support.running import Run, selection

GATHERS = ("twice", "once")
NORMS = ("blocks.2.norm2", "blocks.1.norm2", "blocks.0.norm2", "norm")
"""One of each group, in the order of the groups' reduces."""


def _taken(config: dict[str, Any], between: Callable[[Job], None]) -> dict[str, Tensor]:
    """A step, what comes ``between``, and another step."""
    job = Job(Way(config=config), config["gather"])
    job.take(0)
    job.optimizer.zero_grad()
    between(job)
    job.take(2)
    assert not num_under_way(job.handle)
    assert not job.watch.num_late()
    return job.found


def _step_apart(job: Job, left_out: list[int | None], waits: list[tuple[str, int] | None]) -> str:
    """What is said of a pass for which each rank leaves out the norm at its place, if it has one.

    Each rank waits at once as it shall.
    """
    rank = dist.get_rank()
    if (mine := waits[rank]) is not None:
        wait_at_once(job, *mine)
    said, place = "nothing", left_out[rank]
    parent, _, name = ("" if place is None else NORMS[place]).rpartition(".")
    changes = {} if place is None else {name: nn.Identity()}
    with mock.patch.dict(job.model.get_submodule(parent)._modules, changes):
        try:
            torch.autograd.backward(job.loss(1))
        except RuntimeError as error:
            said = str(error)
    dist.barrier()  # no collective is left half done
    for hook in job.hooks:
        hook.remove()
    return said


Ranks = tuple[int, ...] | None
Case = tuple[list[int | None], list[tuple[str, int] | None]]


def _apart(config: dict[str, Any], cases: list[Case]) -> list[tuple[str, list[str]]]:
    """By case, what is said, and what then differs from a run without that pass."""
    expected = _taken(config, lambda job: None)
    outcomes = []
    for case in cases:
        said: list[str] = []

        def between(job: Job, case: Case = case, said: list[str] = said) -> None:
            said.append(_step_apart(job, *case))

        differs = differing(_taken(config, between), expected)
        outcomes.append((*said, differs))
    return outcomes


def _at(rank: int, what: Any, ranks: int) -> list[Any]:
    """By rank: ``what`` for one of them, None for the others."""
    return [what if each == rank else None for each in range(ranks)]


def _odd_cases(ranks: int, odd: int, by_the_odd: bool, is_root: bool) -> dict[str, Case]:
    """Cases in which one rank leaves out a norm of a block, or of the root.

    In some, that rank or another one waits at once: for the reduce of that group, or of the next.
    """
    waiter = odd if by_the_odd else (odd + 1) % ranks
    root = len(NORMS) - 1
    waits: list[tuple[int, tuple[str, int] | None]] = [(root, None), (root, ("hook", root))]
    if not is_root:
        waits = [(place, None) for place in range(root)]
        for place in (0, root - 1):
            waits += [(place, ("hook", place)), (place, ("gradient", place))]
            waits += [(place, ("hook", place + 1))]
    return {
        f"{NORMS[place]} left out, waits: {wait}": (
            _at(odd, place, ranks),
            _at(waiter, wait, ranks),
        )
        for place, wait in waits
    }


@selection(
    "ranks, odd, gather, by_the_odd, is_root",
    [
        (3, 1, "twice", False, False),
        (3, 0, "once", True, True),
        (4, 1, "twice", False, False),  # in two hops
    ],
    (2, 3, 4),
    (0, 1),
    GATHERS,
    (False, True),
    (False, True),
)
def test_another_set_of_gradients_on_one_rank_ends_in_one_sentence_on_all(
    run: Run, ranks: int, odd: int, gather: str, by_the_odd: bool, is_root: bool
) -> None:
    hops = {"reduce": "two-hop", "ranks_per_node": 2} if ranks == 4 else {}
    cases = _odd_cases(ranks, odd, by_the_odd, is_root)
    if not is_root:  # every other one, the rest where another rank is odd
        cases = dict([*cases.items()][1 - odd :: 2])
    outcomes = run(ranks, _apart, {"gather": gather, **hops}, list(cases.values()))
    for name, each in zip(cases, zip(*outcomes, strict=True), strict=True):
        norm = re.escape(name.partition(" ")[0])
        sentence = rf"rank \d has no gradient of {norm}\.weight and {norm}\.bias to reduce, but .*"
        assert re.fullmatch(sentence, each[0][0]), name
        assert each == ((each[0][0], []),) * ranks, name


SEVERAL: dict[str, Case] = {
    "two ranks, two groups": ([None, 0, 1], [None, None, None]),
    "two ranks, two groups, one waits": ([2, 0, None], [None, None, ("hook", 1)]),
    "two ranks, one group": ([1, None, 1], [("hook", 0), None, None]),
    "all ranks": ([0, 0, 0], [None, ("hook", 0), None]),
}


@selection("gather", [("twice",)], GATHERS)
def test_several_other_sets_end_in_one_sentence_too_unless_all_ranks_change(
    run: Run, gather: str
) -> None:
    outcomes = run(3, _apart, {"gather": gather}, list(SEVERAL.values()))
    for name, each in zip(SEVERAL, zip(*outcomes, strict=True), strict=True):
        if name == "all ranks":  # a step more
            assert [said for said, _ in each] == ["nothing"] * 3
        else:
            assert "has no gradient of" in each[0][0], name
            assert each == ((each[0][0], []),) * 3, name


def _optimized_inside(gather: str, inside: list[Ranks]) -> list[tuple[str, set[str], list[str]]]:
    """What comes of hooks on some ranks that update the second block inside the backward pass.

    By ranks that have hooks, and by group of which one rank leaves out a norm: what is said, the
    modules whose weights change, and weights with NaN in them.
    """
    outcomes = []
    for ranks in inside:
        for place in (0, 1, 2):
            job = Job(Way(prepare=partial(optimize_inside, ranks=ranks)), gather)
            job.take(0)
            job.optimizer.zero_grad()
            before = {name: _shard(p).clone() for name, p in job.model.named_parameters()}
            said = _step_apart(job, [None, place], [None, None])
            job.handle.abandon_step()  # so that the model shows its shards
            after = {name: _shard(p) for name, p in job.model.named_parameters()}
            changed = {name for name, weight in before.items() if weight.ne(after[name]).any()}
            broken = [name for name, weight in after.items() if weight.isnan().any()]
            outcomes.append((said, {name.rpartition(".")[0][:8] for name in changed}, broken))
    return outcomes


def _shard(parameter: Any) -> Tensor:
    local: Tensor = parameter.to_local().detach()
    return local


@selection("gather", [("once",)], GATHERS)
def test_what_is_refused_reaches_no_optimizer_inside_the_backward_pass(
    run: Run, gather: str
) -> None:
    inside: list[Ranks] = [None, (0,), (1,)]
    outcomes = run(2, _optimized_inside, gather, inside)
    for i, ((said, *_), _) in enumerate(zip(*outcomes, strict=True)):
        ranks, place = inside[i // 3], i % 3
        assert said.startswith(f"rank 1 has no gradient of {NORMS[place]}.weight"), (ranks, place)
        for rank, each in enumerate(outcomes):
            is_hooked = ranks is None or rank in ranks
            # Its own refusal comes at once, that of the block behind it at the end.
            is_updated = is_hooked and place != 1
            changed = {"blocks.1"} if is_updated else set()
            assert each[i] == (said, changed, []), (ranks, place, rank)
