"""The average over replicas of ``replicate_mesh`` while it is put off."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import qsdp
from qsdp.comm.traffic import Traffic
from qsdp.compat.parameter_group import parameter_groups
from tests_distributed.support.fsdp2_switches import double
from tests_distributed.support.running import Run
from tests_distributed.support.two_replicas import Stage, Two, refusal_of


def _bytes_of_the_average(put_off: bool) -> int:
    stage = Stage()
    group = set(dist.get_process_group_ranks(stage.mesh["replicate"].get_group()))
    with mock.patch.object(Traffic, "gathered", autospec=True) as gathered:
        for micro in range(3):
            stage.train(micro, averages=not put_off or micro == 2)
    return sum(
        num_bytes
        for _, _, over, num_bytes in (call.args for call in gathered.call_args_list)
        if set(dist.get_process_group_ranks(over)) == group
    )


def test_an_average_that_is_put_off_takes_its_bytes_once(run: Run) -> None:
    each = run(4, _bytes_of_the_average, False)
    assert all(each)
    assert run(4, _bytes_of_the_average, True) == [num_bytes // 3 for num_bytes in each]


def _raise(*_: Any) -> None:
    raise LookupError


def _given_up(how: str) -> list[Tensor]:
    """A step, after one that was given up while the average of its first pass was put off."""
    stage = Stage()
    if how:
        state = stage.handle.state_dict()
        stage.train(5, averages=False)
        assert all(p.grad is None for p in stage.model.parameters())
    if how in ("forward", "backward"):
        hooks = {"forward": "register_forward_hook", "backward": "register_full_backward_hook"}
        hook = getattr(stage.model.first, hooks[how])(_raise)
        with pytest.raises(LookupError):
            stage.train(6, averages=False)
        hook.remove()
    elif how == "abandon_step":
        stage.handle.abandon_step()
    elif how:
        stage.model.reset_iter_state()
    if how:
        stage.model.zero_grad()
        stage.handle.load_state_dict(state)
    stage.train(0, averages=False)
    stage.train(1, averages=True)
    return [p.grad.to_local() for p in stage.model.parameters()]


@pytest.mark.parametrize("how", ["forward", "backward", "abandon_step", "reset_iter_state"])
def test_what_was_put_off_is_dropped_with_its_step(run: Run, how: str) -> None:
    if not hasattr(FSDPModule, "reset_iter_state") and how == "reset_iter_state":
        pytest.skip("this torch has no reset_iter_state")
    torch.testing.assert_close(run(4, _given_up, how), run(4, _given_up, ""), rtol=0, atol=0)


def _refused(work: Callable[[Stage], None]) -> str:
    return refusal_of(lambda: work(Stage()))


def _with_other_parameters(stage: Stage, replicas: tuple[int, ...]) -> None:
    """In the first micro-batch of some replicas the second layer is used too."""
    stage.train(0, averages=False, is_whole=dist.get_rank() // 2 in replicas)
    stage.train(1, averages=True, is_whole=False)


@pytest.mark.parametrize("replicas", [(0, 1), (0,), (1,)])
def test_micro_batches_that_use_other_parameters_are_refused(
    run: Run, replicas: tuple[int, ...]
) -> None:
    said = run(4, _refused, partial(_with_other_parameters, replicas=replicas))
    for rank, sentence in enumerate(said):
        is_own = rank // 2 in replicas
        assert ("second.weight and second.bias had a gradient in some" in sentence) == is_own
        assert is_own or "cannot send its part" in sentence


def _with_a_hook(stage: Stage) -> None:
    stage.model.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    stage.train(0, averages=False)


def _removed(stage: Stage) -> None:
    stage.train(0, averages=False)
    stage.handle.remove()


def _outside(stage: Stage) -> None:
    stage.model.set_requires_gradient_sync(False)
    stage.model(torch.ones(3, 6)).backward()
    stage.model.set_requires_gradient_sync(True)
    stage.model.set_requires_all_reduce(False)
    for group in parameter_groups(stage.model):
        group.fsdp_param_group.post_backward()


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (_with_a_hook, "has a hook on its gradient"),
        (_outside, "outside a backward pass"),
        (_removed, "wait for their average"),
    ],
)
def test_what_cannot_be_put_off_is_refused(run: Run, work: Any, sentence: str) -> None:
    for said in run(4, _refused, work):
        assert sentence in said


def _hooks_after_removal() -> list[Any]:
    model = fully_shard(Two(), mesh=init_device_mesh("cpu", (2,)))
    handle = qsdp.install(model)
    model.set_all_reduce_hook(double)
    handle.remove()
    return [group.comms()[3] for group in parameter_groups(model)]


def test_a_hook_that_was_set_after_install_stays(run: Run) -> None:
    assert run(2, _hooks_after_removal) == [[double]] * 2


def _in_mid_accumulation() -> None:
    stage = Stage()
    stage.train(0, averages=False)
    stage.handle.abandon_step()
    stage.handle.remove()


def test_sums_that_wait_may_be_given_up_for_a_removal(run: Run) -> None:
    run(4, _in_mid_accumulation)
