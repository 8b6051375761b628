"""Reduces that travel beside the backward pass bring what reduces that are waited for bring."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

import qsdp
from qsdp import compat
from qsdp.comm import gather as gathers
from tests_distributed.conftest import Run, selection
from tests_distributed.helpers import Toy, full_grads, make_batch, make_model, shard

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
Grads = list[dict[str, Tensor]]


def _train(way: str, gather: str, bits: int, *, waits: bool) -> tuple[Grads, int]:
    """Gradients after each of three backward passes, and how many reduces were left under way."""
    model = make_model(1, checkpointing=way == "checkpointing", tied=True)
    options: dict[str, Any] = {}
    if way == "bf16":
        options["mp_policy"] = BF16
    shard(model, nested=False, **options)
    if way == "factor":
        for module in (*model.blocks, model):
            module.set_gradient_divide_factor(2.5)  # type: ignore[operator,union-attr]
    handle = qsdp.install(
        model, qsdp.QSDPConfig(weight_bits=bits, grad_bits=bits, gather=gather, seed=3)
    )
    left = 0
    leave = handle._wire.late.leave

    def counted(late: Any) -> None:
        nonlocal left
        left += 1
        leave(late)

    handle._wire.late.leave = counted  # type: ignore[method-assign]
    before = compat.ParameterGroup.may_fill_later
    if waits:
        compat.ParameterGroup.may_fill_later = lambda *_: False  # type: ignore[method-assign]
    try:
        found = []
        for step in range(3):
            if way != "accumulated":
                model.zero_grad()
            _backward(model, step)
            assert not handle._wire.late
            found.append(full_grads(model))
    finally:
        compat.ParameterGroup.may_fill_later = before  # type: ignore[method-assign]
    return found, left


def _backward(model: Toy, step: int) -> None:
    torch.autograd.backward(model(*make_batch(model, step)))


def _both(way: str, gather: str, bits: int) -> list[tuple[Grads, int]]:
    return [_train(way, gather, bits, waits=waits) for waits in (False, True)]


WAYS = ["plain", "bf16", "factor", "accumulated", "checkpointing"]


@selection(
    "world, way, gather",
    [
        *((2, way, "once") for way in WAYS),
        *((2, "plain", "twice"), (3, "plain", "twice"), (3, "accumulated", "once")),
        *((3, "bf16", "once"), (3, "factor", "twice"), (3, "checkpointing", "twice")),
    ],
    [2, 3],
    WAYS,
    ["twice", "once"],
)
def test_gradients_are_the_same(run: Run, world: int, way: str, gather: str) -> None:
    bits = 4 if way == "plain" else 8
    for (found, left), (expected, none) in run(world, _both, way, gather, bits):
        # Where gradients are added up, only the first pass fills views.
        assert left == (3 if way == "accumulated" else 9)
        assert none == 0
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for name, grad in ours.items():
                assert torch.equal(grad, theirs[name]), name


class Mark:
    """Stands for a GPU's event behind what a gather brings."""

    num_waits = 0

    def wait(self) -> None:
        self.num_waits += 1


def _waits(gather: str) -> list[int]:
    """How often each gather's payloads were waited for in a step."""
    model = shard(make_model(1, frozen=True), nested=False)
    qsdp.install(model, qsdp.QSDPConfig(gather=gather))
    marks: list[Mark] = []

    def mark(_: torch.device) -> Mark:
        marks.append(Mark())
        return marks[-1]

    with mock.patch.object(gathers, "written_on_this_stream", mark):
        _backward(model, 0)
    return [mark.num_waits for mark in marks]


def test_payloads_are_waited_for_wherever_they_are_decoded(run: Run) -> None:
    # The root and two blocks, each gathered for either pass.
    assert run(2, _waits, "twice") == [[1] * 6] * 2
    # Each decoded twice; what is frozen of the first block travels by itself.
    assert run(2, _waits, "once") == [[2] * 4] * 2


def _hooked(gather: str) -> bool:
    """Whether what a hook saw in the backward pass is what there is after it."""
    model = shard(make_model(1))
    qsdp.install(model, qsdp.QSDPConfig(gather=gather))
    seen = {}

    def see(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen[parameter] = parameter.grad.to_local().clone()  # type: ignore[attr-defined]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(see)
    _backward(model, 0)
    return len(seen) == len(list(model.parameters())) and all(
        torch.equal(parameter.grad.to_local(), grad)  # type: ignore[union-attr]
        for parameter, grad in seen.items()
    )


@pytest.mark.parametrize("gather", ["twice", "once"])
def test_hooks_in_the_backward_pass_see_finished_gradients(run: Run, gather: str) -> None:
    assert all(run(2, _hooked, gather))


def _cut_short() -> dict[str, Tensor]:
    """An exception in the middle of a backward pass, then a whole pass."""
    model = shard(make_model(1))
    handle = qsdp.install(model, qsdp.QSDPConfig(gather="once"))

    def stop(_: Tensor) -> None:
        raise KeyboardInterrupt  # after the reduces of the blocks behind the first

    def watch(module: Any, args: Any, output: Tensor) -> None:
        output.register_hook(stop)

    watching = model.get_submodule("blocks.0").register_forward_hook(watch)
    loss = model(*make_batch(model, 0))
    watching.remove()
    with pytest.raises(KeyboardInterrupt):
        torch.autograd.backward(loss)
    assert handle._wire.late
    compat.abandon_pass(model)
    model.zero_grad()
    _backward(model, 1)
    assert not handle._wire.late
    return full_grads(model)


def test_a_pass_that_was_cut_short_leaves_nothing_behind(run: Run) -> None:
    first, second = run(2, _cut_short)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(grad.isfinite().all() for grad in first.values())
