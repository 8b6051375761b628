"""Reduces in two hops that one rank waits for at once.

They are beside collectives that are not qsdp's own, and meet an exception.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor, nn

from qsdp.comm import reduce_scatter
from tests_distributed.support import leftovers
from tests_distributed.support.late import (
    MOST,
    Job,
    Way,
    add_another_model,
    cut_short,
    differing,
    late_and_waiting,
    num_under_way,
    take_two_models,
    wait_at_once,
)
from tests_distributed.support.running import Run, selection

GATHERS = ("twice", "once")
TWO_HOPS = {"reduce": "two-hop", "ranks_per_node": 2}
WAITS = ("hook", "gradient")
ODD = 1
"""The rank that waits at once: of a node, and not the first of it."""


def _let_one_wait(job: Job, waits: str, place: int, model: int) -> None:
    """Let one rank wait at once in every pass, for the group at that place of a model."""

    def wait(*_: object) -> None:
        wait_at_once(job, waits, place, model)

    if dist.get_rank() == ODD:
        if waits == "hook":
            wait()
        else:
            job.models[model].register_forward_pre_hook(wait)


def _average_inside(job: Job, waits: str) -> None:
    """Let all ranks average the gradients of some activations.

    After the first block's reduce they do too: no collective of the wire comes behind that before
    the root's.
    """
    _let_one_wait(job, waits, place=2, model=0)

    def average(grad: Tensor) -> Tensor:
        mean = grad.clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(average)

    for module in (job.model.embed, *job.model.blocks):
        module.register_forward_hook(watch)


def _two_models(job: Job, waits: str) -> None:
    """The second model's backward pass comes first, and the first one's before it has ended."""
    add_another_model(job)
    _let_one_wait(job, waits, place=2, model=1)


WAYS = {
    **{
        f"a collective of the user's, {waits}": Way(
            config=TWO_HOPS, prepare=partial(_average_inside, waits=waits)
        )
        for waits in WAITS
    },
    **{
        f"two models, {waits}": Way(
            config=TWO_HOPS, prepare=partial(_two_models, waits=waits), step=take_two_models
        )
        for waits in WAITS
    },
}


def _late_and_waiting(way: str, gather: str) -> tuple[list[str], bool, bool]:
    differs, seen, seen_waiting = late_and_waiting(WAYS[way], gather)
    return differs, any(seen), any(seen_waiting)


@selection(
    "way, gather",
    [("a collective of the user's, gradient", "once"), ("two models, hook", "twice")],
    list(WAYS),
    GATHERS,
)
def test_one_rank_waits_at_once_beside_collectives_that_are_not_its_wires(
    run: Run, way: str, gather: str
) -> None:
    assert run(4, _late_and_waiting, way, gather) == [([], True, False)] * 4


# --- an exception ---------------------------------------------------------------------------------

CALLS = ("abandon_step", "errors", "remove")


def _go_on(job: Job, call: str) -> dict[str, Tensor]:
    """Two steps after ``call``, and what they found."""
    getattr(job.handle, call)()
    assert not num_under_way(job.handle)
    for step in (2, 3):
        job.take(step)
    return job.found


def _after_an_exception(gather: str, waits: str, block: int, call: str) -> tuple[list[str], bool]:
    """What differs from a run without the exception, and whether anything was under way.

    The exception comes in the middle of that block.
    """
    found = []
    for fails in (True, False):
        job = Job(Way(config=TWO_HOPS), gather)
        job.take(0)
        job.optimizer.zero_grad()
        if fails:
            if dist.get_rank() == ODD:
                wait_at_once(job, waits, 0)
            cut_short(job.model, 1, block)
            was_under_way = bool(num_under_way(job.handle))
            for hook in job.hooks:
                hook.remove()
        found.append(_go_on(job, call))
        if call != "remove":
            job.handle.remove()
    return differing(*found), was_under_way


@selection(
    "waits, gather, block, call",
    [
        *(("hook", "twice", 0, call) for call in ("abandon_step", "remove")),
        ("gradient", "once", 1, "errors"),
    ],
    WAITS,
    GATHERS,
    (0, 1),
    CALLS,
)
def test_an_exception_right_after_a_reduce_leaves_nothing(
    run: Run, waits: str, gather: str, block: int, call: str
) -> None:
    for rank, outcome in enumerate(run(4, _after_an_exception, gather, waits, block, call)):
        # The last block's reduce alone has begun before the one ahead of it is through.
        is_left = block == 0 or (waits == "gradient" and rank != ODD)
        assert outcome == ([], is_left), rank


def _removed_with_an_error() -> tuple[int, list[int], list[int]]:
    """How often ``remove`` met an error in what was under way, and what is left.

    That is how many process groups there are and of how many groups gradients are late, before and
    after it.
    """
    before = leftovers.held().groups
    job = Job(Way(config=TWO_HOPS), "twice")
    job.take(0)
    job.optimizer.zero_grad()
    cut_short(job.model, 1)
    late, groups = [job.watch.num_late()], [leftovers.held().groups - before]
    refuse: Any = mock.Mock(side_effect=RuntimeError("a rank has sent something else"))
    with mock.patch.object(reduce_scatter, "check_headers", refuse):
        job.handle.remove()
    late.append(job.watch.num_late())
    groups.append(leftovers.held().groups - before)
    return refuse.call_count, groups, late


def test_two_hops_end_with_remove_though_what_was_under_way_is_an_error(run: Run) -> None:
    assert run(4, _removed_with_an_error) == [(MOST, [2, 0], [MOST, 0])] * 4
