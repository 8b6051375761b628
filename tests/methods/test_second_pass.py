"""What CrAM's and SAM's second pass leaves behind: nothing.

Buffers, and gradients of parameters that another optimizer trains, are those of the pass at the
model's own weights.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsdp
from tests.support.optimizers import MASKED, METHODS, TWO_PASSES, all_bits, closure_of
from tests.support.second_pass import (
    PAIRS,
    WIDTH,
    Steps,
    buffers,
    everything,
    failing,
    grads,
    made,
    make_net,
    net_closure,
    split,
    train_plainly,
    train_with_two,
)
from tests_distributed.support.helpers import Toy, make_model

of_two_passes = pytest.mark.parametrize("method", TWO_PASSES)


# --- buffers ------------------------------------------------------------------------------------


@of_two_passes
def test_buffers_are_those_of_one_pass_at_the_models_own_weights(method: str) -> None:
    net = make_net()
    optimizer = METHODS[method](net, torch.optim.SGD(net.parameters(), lr=0.1))
    for step in range(3):
        twin, before = copy.deepcopy(net), buffers(net)
        seen: list[dict[str, Tensor | None]] = []
        one_pass = net_closure(net, step)

        def closure(one_pass: Callable[[], float] = one_pass, seen: list[Any] = seen) -> float:
            loss = one_pass()
            seen.append(buffers(net))
            return loss

        assert optimizer.step(closure) == net_closure(twin, step)()
        assert len(seen) == 2
        after, expected = buffers(net), buffers(twin)
        assert all_bits(after) == all_bits(expected)
        for name, buffer in after.items():
            if buffer is not None:
                assert buffer.stride() == expected[name].stride(), name  # type: ignore[union-attr]
            if seen[0][name] is before[name]:
                assert buffer is before[name], name
        assert after["blocks.0.shared"] is after["blocks.1.shared"]
        assert int(after["blocks.0.count"]) == int(after["blocks.0.norm.num_batches_tracked"])  # type: ignore[arg-type]
        assert int(after["blocks.0.count"]) == step + 1  # type: ignore[arg-type]


class Spread(nn.Module):
    """All values of its buffer are one in memory, which a pass changes in place."""

    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", torch.zeros(1).expand(WIDTH))

    def forward(self, x_BC: Tensor) -> Tensor:
        with torch.no_grad():
            self.spread[0] += x_BC.sum()
        return x_BC


@of_two_passes
def test_a_buffer_whose_values_share_memory_is_no_exception(method: str) -> None:
    net = make_net()
    net.blocks.append(Spread())
    twin, before = copy.deepcopy(net), net.blocks[2].spread
    optimizer = METHODS[method](net, torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.step(net_closure(net, 0))
    net_closure(twin, 0)()
    assert all_bits(buffers(net)) == all_bits(buffers(twin))
    assert net.blocks[2].spread is before
    assert before.stride() == (0,)  # type: ignore[operator]


@of_two_passes
def test_micro_batches_count_once_too(method: str) -> None:
    net = make_net()
    twin = copy.deepcopy(net)
    optimizer = METHODS[method](net, torch.optim.SGD(net.parameters(), lr=0.1))

    def closure_of_three(called: nn.Module) -> Callable[[], None]:
        def closure() -> None:
            for micro in range(3):
                net_closure(called, micro)()

        return closure

    optimizer.step(closure_of_three(net))
    closure_of_three(twin)()
    assert all_bits(buffers(net)) == all_bits(buffers(twin))


@of_two_passes
def test_the_buffers_of_a_wrapped_model_are_its_own(method: str) -> None:
    net = make_net()
    twin, holder = copy.deepcopy(net), nn.Sequential(net)
    optimizer = METHODS[method](holder, torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.step(net_closure(net, 0))
    net_closure(twin, 0)()
    assert all_bits(buffers(net)) == all_bits(buffers(twin))


# --- another optimizer's gradients --------------------------------------------------------------

TOYS: list[dict[str, Any]] = [{}, {"tied": True, "frozen": True, "unused": True}]


@of_two_passes
@pytest.mark.parametrize("toy", TOYS, ids=str)
@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("make_base", [torch.optim.SGD, torch.optim.Muon])
def test_another_optimizer_finds_the_gradient_of_the_first_pass(
    method: str, toy: dict[str, Any], was_there: bool, make_base: Any
) -> None:
    model, twin = make_model(1, **toy), make_model(1, **toy)
    hidden, rest = split(model)
    optimizer = made(method, model, make_base(hidden.values(), lr=0.1))
    for parameters in (rest, split(twin)[1]):
        for parameter in parameters.values():
            if was_there:
                parameter.grad = 0.1 * parameter.detach()
    optimizer.step(closure_of(model, model, 0))
    closure_of(twin, twin, 0)()
    assert grads(rest) == grads(split(twin)[1])
    assert all(parameter.grad is None for parameter in hidden.values())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)


@of_two_passes
def test_another_optimizers_gradients_add_up_over_steps(method: str) -> None:
    """As it steps once in two steps; with micro-batches in the closure."""
    model, twin = make_model(1), make_model(1)
    hidden, rest = split(model)
    optimizer = made(method, model, torch.optim.SGD(hidden.values(), lr=0.0))

    def closure_of_two(toy: Toy, step: int) -> Callable[[], None]:
        def closure() -> None:
            for micro in range(2):
                closure_of(toy, toy, 2 * step + micro)()

        return closure

    for step in range(2):
        optimizer.step(closure_of_two(model, step))
        closure_of_two(twin, step)()
    assert grads(rest) == grads(split(twin)[1])


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("toy", TOYS, ids=str)
def test_two_passes_warn_of_what_the_base_lacks(method: str, toy: dict[str, Any]) -> None:
    model = make_model(1, **toy)
    hidden, rest = split(model)
    everyone = {**hidden, **rest}
    for parameters, num_lacking in (hidden, len(rest)), (everyone, 0):
        base = torch.optim.SGD(parameters.values(), lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = METHODS[method](model, base)
            for step in range(2):
                model.zero_grad()
                optimizer.step(closure_of(model, model, step))
        texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        if method in MASKED or num_lacking == 0:
            assert not texts
        else:
            (text,) = texts
            assert re.search(rf"\b{num_lacking}\b", text)
            assert "embed.weight" in text
            assert "\n" not in text


def test_the_first_that_the_base_lacks_is_named() -> None:
    model = make_model(1)
    kept = [p for name, p in model.named_parameters() if name != "blocks.1.mlp.gain"]
    with pytest.warns(UserWarning, match=r"\b1\b.*'?blocks\.1\.mlp\.gain"):
        METHODS["CrAM+"](model, torch.optim.SGD(kept, lr=0.1))


class Job(Steps):
    """Those of a net in one process."""

    def __init__(self, method: str) -> None:
        self.model = make_net()
        self.method = method
        hidden, self.rest = split(self.model)
        self.hidden = list(hidden.values())
        self.base = torch.optim.AdamW(self.hidden, lr=1e-2, foreach=True)
        self.optimizer = made(method, self.model, self.base)
        self.other = torch.optim.SGD(self.rest.values(), lr=0.1, momentum=0.9)
        self.losses = []

    def run_pass(self, step: int, num_micro: int | None = None) -> float:
        return net_closure(self.model, step)()


# --- steps that were skipped or cut short --------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "in_pass"),
    [*((method, n) for method in TWO_PASSES for n in (1, 2)), *((method, 1) for method in MASKED)],
)
@pytest.mark.parametrize("bad_step", [0, 1])
@pytest.mark.parametrize(("what", "bad"), [("gradient", math.nan), ("loss", math.inf)])
def test_a_skipped_step_leaves_all_as_before_it(
    method: str, in_pass: int, bad_step: int, bad: float, what: str
) -> None:
    job = Job(method)
    for step in range(bad_step):
        job.prepare(step)
        job.take(step)
        job.end()
    job.prepare(bad_step)
    before = everything(job.model, job.base)

    def spoil(count: int, place: str) -> float | None:
        if (count, place) != (in_pass, "end"):
            return None
        if what == "gradient":
            grad = job.hidden[0].grad  # of which the second pass drops a part
            assert grad is not None
            grad.fill_(bad)
            return None
        return bad

    job.take(bad_step, spoil)
    after = everything(job.model, job.base)
    if method in MASKED:  # whose masks change all the same
        before, after = ({n: each[n] for n in ("gradients", "buffers")} for each in (before, after))
    assert after == before
    assert job.optimizer.skipped_steps == 1
    named = "the loss" if what == "loss" else "the gradient of blocks.0.linear.weight"
    assert job.optimizer.last_bad.startswith(named)
    assert ("second" in job.optimizer.last_bad) == (in_pass == 2)
    before = everything(job.model, job.base)
    job.take(bad_step)
    assert job.optimizer.skipped_steps == 1
    assert job.optimizer.last_bad is None
    assert everything(job.model, job.base)["weights"] != before["weights"]


@pytest.mark.parametrize(
    ("method", "in_pass"),
    [*((method, n) for method in TWO_PASSES for n in (1, 2)), *((method, 1) for method in MASKED)],
)
@pytest.mark.parametrize("where", ["forward", "backward", "end"])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_step_that_was_cut_short_leaves_no_trace(
    method: str, in_pass: int, where: str, bad_step: int
) -> None:
    job, undisturbed = Job(method), Job(method)
    for step in range(4):
        for each in (job, undisturbed):
            each.prepare(step)
        if step == bad_step:
            before = everything(job.model, job.base)
            with pytest.raises(LookupError):
                job.take(step, failing(in_pass, where))
            assert everything(job.model, job.base) == before
        for each in (job, undisturbed):
            each.take(step)
        assert everything(job.model, job.base) == everything(undisturbed.model, undisturbed.base)
        for each in (job, undisturbed):
            each.end()
    assert job.losses == undisturbed.losses
    assert job.optimizer.num_steps == 4


# --- two optimizers, and what else has buffers --------------------------------------------------


@of_two_passes
@pytest.mark.parametrize("tied", [False, True])
def test_two_optimizers_train_as_written_plainly(method: str, tied: bool) -> None:
    model, plain = make_model(1, tied=tied), make_model(1, tied=tied)
    train_with_two(method, model, lambda step: closure_of(model, model, step))
    train_plainly(plain, [0], **PAIRS[method])
    for name, expected in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


def test_a_model_compressed_for_a_while_has_its_own_buffers_again() -> None:
    net = make_net()
    before = all_bits(buffers(net))
    with qsdp.compressed(net, 0.5):
        net_closure(net, 0)()
        assert all_bits(buffers(net)) != before
    assert all_bits(buffers(net)) == before


class Growing(nn.Module):
    """Its buffer has more values after each pass."""

    seen: Tensor

    def __init__(self, data: bool) -> None:
        super().__init__()
        self.data = data
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x_BC: Tensor) -> Tensor:
        grown = torch.cat([self.seen, x_BC.detach().mean().view(1)])
        if self.data:
            self.seen.data = grown
        else:
            self.seen.resize_(len(grown)).copy_(grown)
        return x_BC


@of_two_passes
@pytest.mark.parametrize("data", [False, True])
def test_a_buffer_that_grows_has_grown_once(method: str, data: bool) -> None:
    net = make_net()
    net.blocks.append(Growing(data))
    twin = copy.deepcopy(net)
    optimizer = METHODS[method](net, torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.step(net_closure(net, 0))
    net_closure(twin, 0)()
    assert all_bits(buffers(net)) == all_bits(buffers(twin))
