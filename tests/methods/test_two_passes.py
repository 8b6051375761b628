"""CrAM's and SAM's second pass in a loop that runs its own backward passes: ``second_pass``.

What it must equal, bit for bit, is ``step(closure)``: see test_cram.py for what that does.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsdp
from tests.support.growth import held
from tests.support.second_pass import everything, make_net, net_batch
from tests.support.two_passes import (
    CASES,
    FORMS,
    INIT_SCALE,
    Case,
    Training,
    adamw,
    differing,
    is_advice,
)
from tests_distributed.support.helpers import make_batch, make_model

TOY = Case(options={}, toy={})
NET = Case(options={})


def _training(case: Case, form: str = "context", **options: Any) -> Training:
    if case.toy is None:
        return Training(case, form, make_net(), net_batch, **options)
    toy = make_model(1, num_layers=2, **case.toy)
    return Training(case, form, toy, lambda seed: make_batch(toy, seed, rank=0), **options)


# --- the same as a closure -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("form", "num_micro"), [*zip(FORMS, (2, 3, 1), strict=True)])
def test_every_step_is_that_of_a_closure(case: str, form: str, num_micro: int) -> None:
    mine, plain = (_training(CASES[case], f, num_micro=num_micro) for f in (form, "closure"))
    targets = set()
    for step in range(5):
        for each in (mine, plain):
            each.take(step)
        assert differing(mine.found(), plain.found()) == [], step
        targets.add(str(mine.optimizer.last_target))
    assert mine.optimizer.num_steps == 5
    assert len(targets) > 1 or CASES[case].options is None
    if form == "scaler":
        assert mine.scaler.get_scale() == 4 * INIT_SCALE


def test_a_scaler_that_is_off_scales_by_one() -> None:
    mine, plain = _training(NET, "scaler"), _training(NET, "closure")
    mine.scale = mine.scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(2):
        for each in (mine, plain):
            each.take(step)
    assert differing(mine.found(), plain.found()) == []


@pytest.mark.parametrize("is_optimizers", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_may_end_in_any_way_of_clearing(is_optimizers: bool, set_to_none: bool) -> None:
    mine, plain = _training(TOY), _training(TOY, "closure")
    for step in range(3):
        mine.run_pass(step)
        mine.second(step)
        mine.end()
        (mine.optimizer if is_optimizers else mine.model).zero_grad(set_to_none=set_to_none)
        plain.take(step)
        assert {"gradients"}.issuperset(differing(mine.found(), plain.found()))


def test_gradients_are_cleared_inside_without_harm_to_the_first_ones() -> None:
    mine, plain = _training(NET), _training(NET, "closure")
    for step in range(2):
        mine.run_pass(step)
        with mine.optimizer.second_pass():
            mine.optimizer.zero_grad()
            mine.run_pass(step)
        mine.end()
        mine.called.zero_grad()
        plain.take(step)
        assert differing(mine.found(), plain.found()) == []


@pytest.mark.parametrize("form", ["context", "scaler"])
@pytest.mark.parametrize("plus", [True, False])
def test_a_loop_may_clip_by_itself(form: str, plus: bool) -> None:
    max_norm = 0.05
    mine = _training(Case(options={"plus": plus}, toy={}), form)
    plain = _training(Case(options={"plus": plus, "max_norm": max_norm}, toy={}), "closure")
    for step in range(3):
        mine.run_pass(step)
        mine.second(step)
        if form == "scaler":
            mine.scaler.unscale_(mine.optimizer)
        clipped_to = max_norm * (2 if mine.optimizer.plus else 1)
        assert qsdp.clip_grad_norm_(mine.model.parameters(), clipped_to) > clipped_to
        mine.end()
        mine.called.zero_grad()
        plain.take(step)
        assert {"last_grad_norm"}.issuperset(differing(mine.found(), plain.found()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["CrAM+", "SAM"])
def test_one_region_of_autocast_may_hold_steps(case: str, form: str) -> None:
    """Though it keeps what it has cast of the weights, which are others in each pass."""
    mine, plain = (_training(CASES[case], form, num_micro=2) for _ in range(2))
    for each, keeps in ((mine, True), (plain, False)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
            for step in range(3):
                each.take(step)
    assert differing(mine.found(), plain.found()) == []


# --- steps that are left out ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["context", "scaler"])
@pytest.mark.parametrize("case", ["CrAM+", "SAM"])
@pytest.mark.parametrize("in_pass", [1, 2])
@pytest.mark.parametrize("bad_step", [0, 1])
def test_a_gradient_that_is_not_finite_skips_the_step(
    case: str, form: str, in_pass: int, bad_step: int
) -> None:
    chosen = Case(CASES[case].base, CASES[case].options, toy={})
    mine, plain = (
        _training(chosen, f, num_micro=2, spoilt=(bad_step, in_pass)) for f in (form, "closure")
    )
    for step in range(4):
        before, scale = everything(mine.model, mine.base), mine.scaler.get_scale()
        for each in (mine, plain):
            each.take(step)
        assert differing(mine.found(), plain.found()) == [], step
        after = everything(mine.model, mine.base)
        assert (differing(after, before) == []) == (step == bad_step)
        if form == "scaler" and step == bad_step:
            assert mine.scaler.get_scale() == scale / 2
        assert mine.optimizer.skipped_steps == (step >= bad_step)
        if form == "scaler":  # which tells nobody what it was
            assert (mine.optimizer.last_bad is None) == (step != bad_step)
        else:
            assert mine.optimizer.last_bad == plain.optimizer.last_bad


def test_a_second_pass_beside_a_first_that_was_not_finite_changes_nothing() -> None:
    mine = _training(CASES["CrAM+ of a part"], spoilt=(1, 1))
    mine.take(0)
    mine.run_pass(1)
    before = everything(mine.model, mine.base)
    mine.second(1)
    assert differing(everything(mine.model, mine.base), before) == []


# --- what is refused -----------------------------------------------------------------------------


STALE: dict[str, Callable[[], Training]] = {
    "toy": lambda: _training(TOY),
    "SAM": lambda: _training(CASES["SAM"]),
    "net": lambda: _training(NET),
    "recomputed": lambda: _training(Case(options={}, toy={"checkpointing": True})),
    "recomputed, reentrant": lambda: _training(
        Case(options={}, toy={"checkpointing": True, "reentrant": True})
    ),
}


@pytest.mark.parametrize("how", ["alone", "kept", "beside a fresh one", "after a fresh one"])
@pytest.mark.parametrize("kind", STALE)
def test_a_loss_from_before_is_not_sent_backward_inside(kind: str, how: str) -> None:
    mine, undisturbed = STALE[kind](), STALE[kind]()
    stale = []
    for each in (mine, undisturbed):
        each.take(0)
        if how != "kept":
            each.run_pass(1)
        stale.append(each.called(*each.batch(10)))
        if how == "kept":
            stale[-1].backward(retain_graph=True)
    before = everything(mine.model, mine.base)

    def spoil() -> None:
        with mine.optimizer.second_pass():
            if how == "after a fresh one":
                mine.run_pass(1)
            fresh = mine.called(*mine.batch(10)) if how == "beside a fresh one" else 0
            (stale[0] + fresh).backward()

    with pytest.raises(RuntimeError, match="before the second pass") as caught:
        spoil()
    assert is_advice(str(caught.value)), str(caught.value)
    assert differing(everything(mine.model, mine.base), before) == []
    for each in (mine, undisturbed):
        each.second(1)
        each.end()
    assert differing(mine.found(), undisturbed.found()) == []


@pytest.mark.parametrize("kind", STALE)
def test_a_loss_from_inside_is_not_sent_backward_afterwards(kind: str) -> None:
    mine = STALE[kind]()
    mine.run_pass(0)
    with mine.optimizer.second_pass():
        stale = mine.called(*mine.batch(0))
        mine.run_pass(0)
    with pytest.raises(RuntimeError):
        stale.backward()


def _enter(mine: Training, scale: Any = None) -> None:
    with mine.optimizer.second_pass(scale=scale):
        mine.run_pass(0)


def _nest(mine: Training) -> None:
    mine.run_pass(0)
    with mine.optimizer.second_pass():
        mine.run_pass(0)
        _enter(mine)


def _step_inside(mine: Training) -> None:
    mine.run_pass(0)
    with mine.optimizer.second_pass():
        mine.run_pass(0)
        mine.optimizer.step()


def _closure_inside(mine: Training) -> None:
    mine.run_pass(0)
    with mine.optimizer.second_pass():
        mine.optimizer.step(lambda: mine.run_pass(0))


def _step_alone(mine: Training) -> None:
    mine.run_pass(0)
    mine.optimizer.step()


def _enter_twice(mine: Training) -> None:
    mine.run_pass(0)
    mine.second(0)
    mine.second(0)


def _enter_twice_and_clip(mine: Training) -> None:
    mine.run_pass(0)
    mine.second(0)
    qsdp.clip_grad_norm_(mine.model.parameters(), 0.05)
    mine.second(0)


def _enter_twice_and_unscale(mine: Training) -> None:
    mine.run_pass(0)
    mine.second(0)
    mine.scaler.scale(torch.ones(1))
    mine.scaler.unscale_(mine.optimizer)
    mine.second(0)


def _closure_after(mine: Training) -> None:
    mine.run_pass(0)
    mine.second(0)
    mine.optimizer.step(lambda: mine.run_pass(0))


def _run_nothing_inside(mine: Training) -> None:
    mine.run_pass(0)
    with mine.optimizer.second_pass():
        pass


def _step_on_a_first_pass_alone(mine: Training) -> None:
    mine.run_pass(0)
    mine.second(0)
    mine.model.zero_grad()
    mine.run_pass(0)
    mine.optimizer.step()


def _step_on_a_first_pass_alone_of_a_step_left_out(mine: Training) -> None:
    mine.spoilt = (0, 1)
    mine.run_pass(0)
    mine.second(0)
    mine.spoilt = None
    mine.model.zero_grad()
    mine.run_pass(0)
    mine.optimizer.step()


def _step_on_nothing(mine: Training) -> None:
    mine.run_pass(0)
    mine.second(0)
    mine.model.zero_grad()
    mine.optimizer.step()


def _enter_unscaled(mine: Training) -> None:
    mine.scaler.scale(mine.called(*mine.batch(0))).backward()
    mine.scaler.unscale_(mine.optimizer)
    _enter(mine, mine.scaler)


MISUSES = {
    "no first pass": _enter,
    "nested": _nest,
    "a step inside": _step_inside,
    "a step with a closure inside": _closure_inside,
    "a step alone": _step_alone,
    "a second pass after another": _enter_twice,
    "a second pass after another, which was clipped": _enter_twice_and_clip,
    "a second pass after another, which was unscaled": _enter_twice_and_unscale,
    "a closure after a second pass": _closure_after,
    "no pass inside": _run_nothing_inside,
    "unscaled already": _enter_unscaled,
    "a step on another first pass": _step_on_a_first_pass_alone,
    "a step on another, the second was left out": _step_on_a_first_pass_alone_of_a_step_left_out,
    "a step on nothing": _step_on_nothing,
}


@pytest.mark.parametrize("misuse", MISUSES)
@pytest.mark.parametrize("num_before", [0, 1])
def test_a_wrong_order_is_refused_and_leaves_no_trace(misuse: str, num_before: int) -> None:
    mine, undisturbed = _training(TOY), _training(TOY)
    for each in (mine, undisturbed):
        for _ in range(num_before):
            each.take(7)
    before = everything(mine.model, mine.base)
    with pytest.raises(RuntimeError) as caught:
        MISUSES[misuse](mine)
    assert is_advice(str(caught.value)), str(caught.value)
    for each in (mine, undisturbed):
        each.called.zero_grad()
    assert differing(everything(mine.model, mine.base), before) == []
    if mine.optimizer.num_steps == undisturbed.optimizer.num_steps:
        for each in (mine, undisturbed):
            each.take(1)
        assert differing(mine.found(), undisturbed.found()) == []


def test_one_second_pass_is_for_one_step() -> None:
    mine = _training(TOY)
    mine.run_pass(0)
    mine.second(0)
    mine.end()
    before = mine.found()
    with pytest.raises(RuntimeError) as caught:
        mine.optimizer.step()
    assert is_advice(str(caught.value)), str(caught.value)
    assert differing(mine.found(), before) == []


def test_a_second_pass_that_was_given_up_does_not_reach_the_next_step() -> None:
    """But for the step's number."""
    case = Case(options={"sparsity": 0.5}, toy={})
    mine, undisturbed = _training(case), _training(case)
    mine.run_pass(3)
    mine.second(3)
    mine.model.zero_grad()
    for each in (mine, undisturbed):
        each.take(0)
    names = ("weights", "moments", "gradients", "last_grad_norm")
    found, expected = mine.found(), undisturbed.found()
    assert [name for name in names if found[name] != expected[name]] == []


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, "1024", [2.0]], ids=repr)
def test_a_scale_that_is_none_is_refused(scale: Any) -> None:
    mine, undisturbed = _training(TOY), _training(TOY)
    for each in (mine, undisturbed):
        each.run_pass(0)
    before = mine.found()
    with pytest.raises((ValueError, TypeError), match="scale is") as caught:
        _enter(mine, scale)
    assert is_advice(str(caught.value)), str(caught.value)
    assert differing(mine.found(), before) == []
    for each in (mine, undisturbed):
        each.second(0)
        each.end()
    assert differing(mine.found(), undisturbed.found()) == []


# --- what is raised inside -----------------------------------------------------------------------


# What is of the last step, which has begun.
UNDONE = ([], ["last_target"], ["last_target", "last_grad_norm"])


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["begin", "forward", "backward", "between", "end"])
@pytest.mark.parametrize("case", ["CrAM+ of a part", "SAM with buffers"])
def test_an_exception_inside_leaves_all_as_on_entry(
    case: str, where: str, error: type[BaseException]
) -> None:
    mine, undisturbed = (_training(CASES[case], num_micro=2) for _ in range(2))
    for each in (mine, undisturbed):
        each.take(0)
        each.run_pass(1)
    with torch.no_grad():
        for each in (mine, undisturbed):
            each.model.get_parameter("blocks.0.linear.weight")[0, 0] = -0.0
    before = mine.found()

    def fail(*_: object) -> None:
        raise error("on purpose")

    def on_forward(_: object, __: object, output: Tensor) -> None:
        output.register_hook(fail)

    blocks, hooks = mine.model.blocks, []
    if where == "forward":
        hooks.append(blocks[1].register_forward_pre_hook(fail))
    if where == "backward":
        hooks.append(blocks[0].register_forward_hook(on_forward))

    def fail_inside() -> None:
        with mine.optimizer.second_pass():
            if where == "begin":
                fail()
            if where == "between":
                mine.called(*mine.batch(10)).backward()
                fail()
            mine.run_pass(1)
            fail()

    with pytest.raises(error, match="on purpose"):
        fail_inside()
    for hook in hooks:
        hook.remove()
    assert differing(mine.found(), before) in UNDONE
    with pytest.raises(RuntimeError):
        mine.optimizer.step()
    assert differing(mine.found(), before) in UNDONE
    for each in (mine, undisturbed):
        each.second(1)
        each.end()
        each.called.zero_grad()
        each.take(2)
    assert differing(mine.found(), undisturbed.found()) == []


# --- what it leaves alone ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_the_grad_mode_is_the_callers(mode: Any) -> None:
    mine = _training(TOY)
    mine.run_pass(0)
    modes = []
    with mode():
        before = torch.is_grad_enabled()
        with pytest.raises(LookupError), mine.optimizer.second_pass():
            raise LookupError
        modes.append(torch.is_grad_enabled())
        with mine.optimizer.second_pass():
            modes.append(torch.is_grad_enabled())
            with torch.enable_grad():
                mine.run_pass(0)
            modes.append(torch.is_grad_enabled())
        modes.append(torch.is_grad_enabled())
    assert modes == [before] * 4
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("end", ["a step", "an exception", "a refusal", "given up"])
def test_nothing_holds_a_model_that_was_dropped(end: str) -> None:
    mine = _training(NET, "scaler")
    mine.take(0)
    mine.run_pass(1)
    if end == "a step":
        mine.second(1)
        mine.end()
    elif end == "an exception":
        with pytest.raises(LookupError), mine.optimizer.second_pass(scale=mine.scaler):
            raise LookupError
    elif end == "a refusal":
        with pytest.raises(ValueError, match="scale"):
            _enter(mine, 0)
    else:
        mine.second(1)
    watched = [weakref.ref(each) for each in (mine.model, mine.optimizer, mine.base)]
    del mine
    gc.collect()
    assert [each() for each in watched] == [None] * 3


@pytest.mark.parametrize("case", ["clipped", "CrAM", "SAM"])
def test_no_copies_are_kept_after_the_second_pass(case: str) -> None:
    mine = _training(CASES[case], "closure")

    def seen() -> Counter[str]:
        gradients = [parameter.grad for parameter in mine.model.parameters()]
        found = held()  # of tensors that Python knows
        del gradients
        return found

    for step in range(2):
        mine.take(step)
    between_steps = seen()
    mine.form = "context"
    mine.run_pass(2)
    after_the_first = seen()
    mine.second(2)
    after_the_second = seen()
    mine.end()
    mine.called.zero_grad()
    assert seen() == between_steps
    for count in ("tensors", "bytes of tensors"):
        assert after_the_second[count] == after_the_first[count] > between_steps[count]


# --- optimizers that are seen through ------------------------------------------------------------

SCHEDULE = qsdp.ACDCSchedule(steps=9, warmup=1, phase=2, last_dense=0, last_sparse=2)
GROWTH = qsdp.GMPSchedule(steps=9, start=1, every=1, end=5, initial=0.2, sparsity=0.6)


class InnerBlocks(nn.Module):
    """Blocks that go by numbers in a dictionary, as torchtitan's do."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        inner.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(inner.blocks)})

    def forward(self, x_BC: Tensor, targets_B: Tensor) -> Tensor:
        for block in self.inner.blocks.values():
            x_BC = block(x_BC)
        return nn.functional.cross_entropy(self.inner.head(x_BC), targets_B)


def test_blocks_in_a_dictionary_are_prunable() -> None:
    model, plain = InnerBlocks(make_net()), make_net()
    trainings = [Training(NET, "closure", each, net_batch) for each in (model, plain)]
    for each in trainings:
        each.take(0)
    names = [each.optimizer.prunable.names for each in trainings]
    assert list(names[0]) == [f"inner.{name}" for name in names[1]]
    assert list(names[1]) == ["blocks.0.linear.weight", "blocks.1.linear.weight"]
    for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, expected)


WRAPPERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "CrAM": lambda model, base: qsdp.CrAM(model, base, sparsity=(0.3, 0.6), max_norm=0.05),
    "ACDC": lambda model, base: qsdp.ACDC(model, base, schedule=SCHEDULE, target=0.5),
    "GMP": lambda model, base: qsdp.GMP(model, base, schedule=GROWTH),
}


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate", reason="accelerate is not installed")
    yield module
    module.state.AcceleratorState._reset_state(True)
    module.state.GradientState._reset_state()


def _micro_step(optimizer: Any, method: str, run_pass: Callable[[], None]) -> None:
    """What a loop does after the last backward pass of a step."""
    if method == "CrAM":
        with optimizer.second_pass():
            run_pass()
    optimizer.step()
    optimizer.zero_grad()


def _found(model: nn.Module, base: Any, optimizer: Any) -> dict[str, Any]:
    return everything(model, base) | {
        "num_steps": optimizer.num_steps,
        "pruned": optimizer.pruned,
        "target": str(optimizer.last_target),
    }


@pytest.mark.parametrize("method", WRAPPERS)
@pytest.mark.parametrize("num_micro", [1, 2])
def test_accelerates_optimizer_is_seen_through(
    accelerate: Any, method: str, num_micro: int
) -> None:
    """``accumulate`` has its own word on which steps are to be taken."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=num_micro)
    model, plain = make_model(1), make_model(1)
    base, alone = adamw(model.parameters()), adamw(plain.parameters())
    optimizer = WRAPPERS[method](model, accelerator.prepare_optimizer(base))
    expected = WRAPPERS[method](plain, alone)
    assert optimizer.base is base

    def backward(loss: Tensor) -> None:
        (loss / num_micro).backward()

    def run(of: Any, send_backward: Any, micros: range) -> None:
        for micro in micros:
            send_backward(of(*make_batch(model, micro, rank=0)))

    for i in range(4 * num_micro):
        with accelerator.accumulate(model):
            run(model, accelerator.backward, range(i, i + 1))
            run(plain, backward, range(i, i + 1))
            all_micro = range(i - num_micro + 1, i + 1)
            if accelerator.sync_gradients:
                run_again = partial(run, model, accelerator.backward, all_micro)
                _micro_step(optimizer, method, run_again)
                _micro_step(expected, method, partial(run, plain, backward, all_micro))
            else:
                optimizer.step()
                optimizer.zero_grad()
        found = _found(model, base, optimizer)
        assert differing(found, _found(plain, alone, expected)) == []
    assert optimizer.num_steps == 4


@pytest.fixture
def fabric() -> Any:
    module = pytest.importorskip("lightning.fabric", reason="lightning is not installed")
    return module.Fabric(accelerator="cpu", devices=1)


@pytest.mark.parametrize("method", WRAPPERS)
def test_fabrics_optimizer_is_seen_through(fabric: Any, method: str) -> None:
    model, plain = make_model(1), make_model(1)
    base, alone = adamw(model.parameters()), adamw(plain.parameters())
    optimizer = WRAPPERS[method](model, fabric.setup_optimizers(base))
    expected = WRAPPERS[method](plain, alone)
    assert optimizer.base is base
    for step in range(4):
        for of, steps in (model, optimizer), (plain, expected):

            def run_pass(of: nn.Module = of, step: int = step) -> None:
                of(*make_batch(model, step, rank=0)).backward()

            run_pass()
            _micro_step(steps, method, run_pass)
        found = _found(model, base, optimizer)
        assert differing(found, _found(plain, alone, expected)) == []


@pytest.mark.parametrize("method", WRAPPERS)
def test_a_wrapped_optimizer_with_a_scaler_is_refused(accelerate: Any, method: str) -> None:
    accelerate.Accelerator(cpu=True)
    model = make_model(1)
    base = adamw(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    outer = accelerate.optimizer.AcceleratedOptimizer(base, scaler=scaler)
    with pytest.raises(ValueError, match=r"GradScaler.*: wrap .* before") as caught:
        WRAPPERS[method](model, outer)
    assert is_advice(str(caught.value)), str(caught.value)


def test_fabrics_wrapper_takes_second_passes(fabric: Any) -> None:
    mine, plain = _training(TOY), _training(TOY)
    inner = mine.optimizer
    mine.optimizer = fabric.setup_optimizers(inner)
    for step in range(3):
        mine.take(step)
        plain.take(step)
    mine.optimizer = inner
    assert differing(mine.found(), plain.found()) == []


def test_what_fabrics_wrapper_is_asked_reaches_what_is_inside(fabric: Any) -> None:
    mine = _training(TOY)
    mine.optimizer = fabric.setup_optimizers(mine.optimizer)
    told: list[Any] = []
    mine.optimizer.share_support(lambda masks, **_: told.append(masks))
    assert told == [None]  # of the masks of another optimizer, of before
    mine.run_pass(0)
    mine.second(0)
    mine.optimizer.zero_grad()  # and the step is left out
    mine.run_pass(0)
    with pytest.raises(RuntimeError, match="would be a plain step"):
        mine.optimizer.step()


def test_fabrics_optimizer_with_a_scaler_is_refused(fabric: Any) -> None:
    model = make_model(1)
    outer = fabric.setup_optimizers(adamw(model.parameters()))
    fabric.strategy.precision.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="GradScaler") as caught:
        WRAPPERS["ACDC"](model, outer)
    assert is_advice(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("method", WRAPPERS)
def test_the_advice_for_a_scaler_trains_as_without_one(accelerate: Any, method: str) -> None:
    accelerate.Accelerator(cpu=True)
    model, plain = make_model(1), make_model(1)
    base, alone = adamw(model.parameters()), adamw(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)
    made = WRAPPERS[method](model, base)
    outer = accelerate.optimizer.AcceleratedOptimizer(made, scaler=scaler)
    expected = WRAPPERS[method](plain, alone)
    for step in range(4):

        def run_pass(of: Any, multiplied: Any = lambda loss: loss, step: int = step) -> None:
            multiplied(of(*make_batch(model, step, rank=0))).backward()

        run_pass(model, scaler.scale)
        if method == "CrAM":
            with outer.optimizer.second_pass(scale=scaler):
                run_pass(model, scaler.scale)
        outer.step()
        outer.zero_grad()
        run_pass(plain)
        _micro_step(expected, method, lambda: run_pass(plain))
        found = _found(model, base, outer.optimizer)
        assert differing(found, _found(plain, alone, expected)) == []
    assert outer.optimizer.num_steps == 4
