"""What is seen of reduces that are under way, and what becomes of them when a pass is cut short."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import qsdp
from qsdp.compat.autograd import after_backward
from qsdp.compat.interrupted_passes import abandon_pass
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.late import (
    BESIDE,
    MOST,
    Fault,
    Job,
    Way,
    cut_short,
    differing,
    groups_of,
    is_late,
    num_under_way,
    wait_at_once,
    waiting,
)
from tests_distributed.support.running import Run, selection

GATHERS = ("twice", "once")
PLAIN = Way()
ZEROS = ("", "to none", "in place")

# --- in the middle of a backward pass -------------------------------------------------------------


class Look:
    """What a hook in the middle of a block's backward pass finds."""

    def __init__(self, job: Job) -> None:
        groups = job.watch.groups
        self.late = [place for place, group in enumerate(groups) if is_late(group)]
        self.num_under_way = num_under_way(job.handle)
        self.grads = [
            [p.grad.to_local().clone() for p in group if p.grad is not None]  # type: ignore[attr-defined]
            for group in groups
        ]


def _looks(gather: str, hooked: bool) -> tuple[list[list[int]], bool, bool]:
    """By look: which groups are late. Whether these are NaN as a whole, and the others right.

    ``hooked``: on one rank, a gradient of the fourth block has a hook.
    """
    job = Job(Way(options={"num_layers": 5}), gather)
    if hooked and dist.get_rank() == 1:
        parameter = job.model.get_parameter("blocks.3.out.bias")
        parameter.register_post_accumulate_grad_hook(lambda _: None)
    looks: list[Look] = []

    def look(module: nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(lambda _: looks.append(Look(job)))

    for block in job.model.blocks:
        block.norm1.register_forward_hook(look)
    job.take(0)
    end = Look(job)
    looks.append(end)
    whole = all(
        bool(grad.isnan().all()) for at in looks for place in at.late for grad in at.grads[place]
    )
    right = all(
        torch.equal(found, grad)
        for at in looks
        for place, grads in enumerate(at.grads)
        for found, grad in zip(grads, end.grads[place], strict=False)  # or it has none yet
        if place not in at.late
    )
    assert [at.num_under_way for at in looks] == [len(at.late) for at in looks]
    return [at.late for at in looks], whole, right


@pytest.mark.parametrize("gather", GATHERS)
def test_gradients_are_nan_until_the_third_reduce_begins_and_then_right(
    run: Run, gather: str
) -> None:
    # The root comes first of the groups, and the last block first in the backward pass.
    expected = [[], [5], [4, 5], [3, 4], [2, 3], []]
    assert run(2, _looks, gather, False) == [(expected, True, True)] * 2


@pytest.mark.parametrize("gather", GATHERS)
def test_a_group_with_a_hook_on_one_rank_is_waited_for_on_all(run: Run, gather: str) -> None:
    expected = [[], [5], [5], [3, 5], [2, 3], []]
    assert run(2, _looks, gather, True) == [(expected, True, True)] * 2


# --- an exception in the backward pass of all ranks -----------------------------------------------


def _validate(job: Job) -> None:
    with torch.no_grad():
        job.note({"loss of a validation": job.loss(50)})


def _validate_exactly(job: Job) -> None:
    with job.handle.exact():
        assert not num_under_way(job.handle)
        _validate(job)


def _note_errors(job: Job) -> None:
    for name, errors in job.handle.errors().items():
        job.note({f"error of {name}": torch.tensor(errors["weight"] or 0.0)})


def _support(job: Job) -> None:
    weight = job.model.blocks[1].get_parameter("qkv.weight")
    job.handle.set_support({weight: torch.ones_like(weight.to_local(), dtype=torch.bool)})


Drain = Callable[[Job, dict[str, Any]], object]

DRAINS: dict[str, Drain] = {
    "forward": lambda job, _: job.loss(50),
    "validation": lambda job, _: _validate(job),
    "exact": lambda job, _: _validate_exactly(job),
    "abandon_pass": lambda job, _: abandon_pass(job.model),
    "abandon_step": lambda job, _: job.handle.abandon_step(),
    "state_dict": lambda job, _: job.handle.state_dict(),
    "load_state_dict": lambda job, state: job.handle.load_state_dict(
        {**state, "step": 4, "reduced": 0}
    ),
    "set_support": lambda job, _: _support(job),
    "set_support of nothing": lambda job, _: job.handle.set_support(None),
    "errors": lambda job, _: _note_errors(job),
    "remove": lambda job, _: job.handle.remove(),
}
"""Each is given what ``state_dict`` gave before the exception."""
# An exception does not bring the step nearer before which levels are learned.
LEARNED = {"weight_bits": 4, "grad_bits": 4, "levels": "learned", "level_steps": (2,)}


def _drained(drain: str, gather: str, zero: str | None) -> tuple[dict[str, Tensor], list[int]]:
    """Steps after an exception and ``drain``; how many groups were late before that, and after it.

    ``zero``: how gradients are set to zero between the two; None: there is no exception.
    """
    late: list[int] = []
    job = Job(Way(config=LEARNED) if drain == "errors" else PLAIN, gather)
    job.take(0)
    job.optimizer.zero_grad()
    state = job.handle.state_dict()
    if zero is not None:
        cut_short(job.model, 1)
        late += [job.watch.num_late(), num_under_way(job.handle)]
    if zero:
        job.optimizer.zero_grad(set_to_none=zero == "to none")
    DRAINS[drain](job, state)
    late += [job.watch.num_late(), num_under_way(job.handle)]
    if not zero:
        job.optimizer.zero_grad()
    for step in (1, 2):
        job.backward(job.loss(step))
        job.optimizer.step()
        job.optimizer.zero_grad()
    job.note({name: p.to_local().detach() for name, p in job.model.named_parameters()})
    return job.found, late


def _drained_and_not(drain: str, gather: str, zero: str) -> tuple[list[str], list[int]]:
    """What differs from a run without the exception, and how many groups were late."""
    expected, _ = _drained(drain, gather, None)
    found, late = _drained(drain, gather, zero)
    return differing(found, expected), late


@selection(
    "drain, gather, zero",
    [(drain, GATHERS[i % 2], ZEROS[i % 3]) for i, drain in enumerate(DRAINS)],
    DRAINS,
    GATHERS,
    ZEROS,
)
def test_what_an_exception_left_under_way_is_drained_and_forgotten(
    run: Run, drain: str, gather: str, zero: str
) -> None:
    assert run(2, _drained_and_not, drain, gather, zero) == [([], [MOST, MOST, 0, 0])] * 2


def _drained_by_another_whole(
    gather: str, reshard: bool, zero: bool
) -> tuple[list[str], int, int, float]:
    """A pass of a second model, on the same wire, after that of the first was cut short.

    Then comes a pass of the first. Returns what differs from a run without the exception; groups
    that are late after it, and after the second model's pass; the first model's largest gradient
    then.

    Where its weights stay gathered, it begins with a reduce. ``zero``: gradients of the first model
    are set to zero before it.
    """
    found: list[dict[str, Tensor]] = []
    for fails in (True, False):
        models: Any = nn.ModuleList(
            shard(make_model(seed, num_layers=3), nested=False, reshard=reshard) for seed in (1, 2)
        )
        handle = qsdp.install(models, qsdp.QSDPConfig(gather=gather))
        first, second = models
        optimizer = torch.optim.SGD(first.parameters())  # in a pass, a model shows other tensors
        loss = second(*make_batch(second, 0))
        if fails:
            cut_short(first, 1)
            before = sum(map(is_late, groups_of(first)))
            if zero:
                optimizer.zero_grad(set_to_none=False)
        torch.autograd.backward(loss)
        if fails:
            after = sum(map(is_late, groups_of(models)))
            grads = [p.grad for group in groups_of(first) for p in group if p.grad is not None]
            assert grads
            largest = max(float(grad.to_local().abs().sum()) for grad in grads)  # type: ignore[attr-defined]
        assert not num_under_way(handle)
        optimizer.zero_grad()
        torch.autograd.backward(first(*make_batch(first, 2)))
        parameters = models.named_parameters()
        found.append({name: p.grad.to_local().clone() for name, p in parameters})
    return differing(*found), before, after, largest


@pytest.mark.parametrize(
    ("gather", "reshard", "zero"), [("twice", True, False), ("once", False, True)]
)
def test_the_first_collective_of_another_model_drains_too_and_brings_nothing_back(
    run: Run, gather: str, reshard: bool, zero: bool
) -> None:
    outcome = run(2, _drained_by_another_whole, gather, reshard, zero)
    assert outcome == [([], MOST, 0, 0.0)] * 2


def _queue(work: Callable[[], None], module: nn.Module, args: object, output: Tensor) -> None:
    output.register_hook(lambda _: after_backward(work))


def _raise() -> None:
    raise Fault


def _raised_at_the_end(gather: str, waits: str) -> tuple[list[int], list[str]]:
    """A callback of the user's raises at the end of a backward pass.

    In that pass one rank ``waits`` at once for every reduce. Returns the step after that pass and
    after each of two further ones, and what differs from a run without it: where there are hooks,
    without the exception alone, since nothing of the pass was left when it came.
    """

    found: list[dict[str, Tensor]] = []
    steps: list[list[int]] = []
    for fails in (True, False):
        job = Job(PLAIN, gather)
        job.take(0)
        job.optimizer.zero_grad()
        if fails or waits == "hook":
            for place in range(len(BESIDE) if waits and dist.get_rank() == 1 else 0):
                wait_at_once(job, waits, place)
            queue = partial(_queue, _raise if fails else lambda: None)
            watching = job.model.blocks[2].mlp.register_forward_hook(queue)
            loss = job.loss(1)
            watching.remove()
            with pytest.raises(Fault) if fails else nullcontext():
                torch.autograd.backward(loss)
            for hook in job.hooks:
                hook.remove()
        steps.append([job.handle.state_dict()["step"]])
        for seed in (2, 3):
            job.take(seed)
            steps[-1].append(job.handle.state_dict()["step"])
        assert not num_under_way(job.handle)
        found.append(job.found)
    return steps[0], differing(*found)


@selection(
    "waits, gather",
    [("hook", "twice"), ("gradient", "once"), ("", "twice")],
    ("hook", "gradient", ""),
    GATHERS,
)
def test_a_callback_that_raises_at_the_end_leaves_no_rank_a_step_ahead(
    run: Run, waits: str, gather: str
) -> None:
    steps = [1, 2, 3] if waits == "hook" else [1, 1, 2]
    assert run(2, _raised_at_the_end, gather, waits) == [(steps, [])] * 2


def _dropped(gather: str) -> tuple[int, list[str], list[str]]:
    """What is left when all is dropped in the middle.

    It is how many groups were late then, what is alive after it, and what is wrong with a training
    that follows. Threads that are left the pool would find.
    """
    job = Job(PLAIN, gather)
    job.take(0)
    job.optimizer.zero_grad()
    cut_short(job.model, 1)
    late = job.watch.num_late()
    made: dict[str, Any] = {"the model": job.model, "the handle": job.handle}
    for name, parameter in job.model.named_parameters():
        made |= {name: parameter, f"the gradient of {name}": parameter.grad}
    references = {name: weakref.ref(each) for name, each in made.items() if each is not None}
    del job, made, parameter
    gc.collect()
    alive = [name for name, reference in references.items() if reference() is not None]
    found = Job(PLAIN, gather).train()
    with waiting():
        expected = Job(PLAIN, gather).train()
    return late, alive, differing(found, expected)


@pytest.mark.parametrize("gather", GATHERS)
def test_what_is_under_way_dies_with_its_model(run: Run, gather: str) -> None:
    assert run(2, _dropped, gather) == [(MOST, [], [])] * 2
