"""Inside ``handle.aside()`` weights travel fresh; what is kept of them stays as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import qsdp
from tests_distributed.support.delta import (
    bits_of,
    decoded,
    installed,
    masks_of,
    other_weights,
    prune,
    same_on_all_ranks,
    sent_while,
    support,
    take_sgd_step,
)
from tests_distributed.support.helpers import make_batch
from tests_distributed.support.interruptions import Fault, hooked
from tests_distributed.support.one_rank import (
    FORWARD,
    Act,
    Point,
    Stage,
    assert_said,
    both,
    differs,
    forward,
    say_at_each,
    train,
)
from tests_distributed.support.running import Run, selection
from tests_distributed.support.training import State, adamw, exact_state
from tests_distributed.support.two_replicas import refusal_of

SEED = 100

# --- weights inside are those of gather once ----------------------------------------------------

FRESH: dict[str, Any] = {"weight_bits": 4, "grad_bits": 4, "weight_bucket_size": 128}
FRESH |= {"rounding": "dither"}
INSIDE_ALONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frozen": ({}, {"frozen": True, "unused": True}),
    "nearest": ({"rounding": "nearest"}, {"tied": True}),
    "called again, re-computed": ({"weight_bits": 8}, {"again": True, "checkpointing": True}),
    "in a warm-up": ({"warmup_steps": 2, "warmup_bits": 6}, {"frozen": True}),
    "a budget": ({"budget": 6.0}, {"width": 32, "hidden": 32}),
    "learned levels of gradients": (
        {"weight_bits": 8, "grad_bits": 3, "levels": "learned", "level_steps": (1, 2)},
        {"width": 32, "hidden": 32},
    ),
}
"""Settings of wires, and of models."""


def _inside(gather: str, name: str) -> tuple[list[float], dict[str, bytes], list[tuple[int, int]]]:
    """Losses, weights, and bytes of forward and backward gathers, of steps inside asides."""
    config, options = INSIDE_ALONE[name]
    model, handle = installed(1, {**FRESH, **config, "gather": gather}, **options)
    losses, sent = [], []

    def step(seed: int) -> None:
        loss: Any = []
        there = sent_while(handle, lambda: loss.append(model(*make_batch(model, seed))))
        back = sent_while(handle, lambda: torch.autograd.backward(loss[0]))
        losses.append(float(loss[0].detach()))
        sent.append((there["gather_sent_bytes"], back["gather_sent_bytes"]))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.1)
                p.grad = None

    with handle.aside():
        step(0)
        model.eval()
        with torch.no_grad():
            losses.append(float(model(*make_batch(model, SEED))))
        model.train()
        step(1)
    with handle.aside():
        step(2)
    return losses, bits_of(dict(model.named_parameters())), sent


@selection("name", [("frozen",)], INSIDE_ALONE)
def test_a_training_inside_is_that_of_a_wire_that_gathers_once(run: Run, name: str) -> None:
    once = run(3, _inside, "once", name)
    for found, expected in zip(run(3, _inside, "delta", name), once, strict=True):
        assert found == expected
        *_, sent = found
        if name != "called again, re-computed":  # whose blocks are computed three times a pass
            assert all(back == 0 for _, back in sent)
        if name == "frozen":  # which is sent once
            assert sent[0] > sent[1] == sent[2]


# --- what is kept is as if nobody had been inside ------------------------------------------------

Inside = Callable[[Any, qsdp.Handle], None]


def _evaluate(model: Any, _: qsdp.Handle) -> None:
    model.eval()
    with torch.no_grad(), other_weights(model):
        model(*make_batch(model, SEED))
        model(*make_batch(model, SEED + 1))
    model.train()


def _train(model: Any, _: qsdp.Handle) -> None:
    with other_weights(model):
        torch.autograd.backward(model(*make_batch(model, SEED)))
    model.zero_grad()


def _train_twice(model: Any, handle: qsdp.Handle) -> None:
    _train(model, handle)
    _evaluate(model, handle)
    _train(model, handle)


def _raise(where: str) -> Inside:
    def act(model: Any, _: qsdp.Handle) -> None:
        with other_weights(model), hooked(model, where):
            torch.autograd.backward(model(*make_batch(model, SEED)))

    return act


def _prune(model: Any, handle: qsdp.Handle) -> None:
    """As ``_train``, where a part is pruned meanwhile, and the wire hears of it."""
    with other_weights(model):
        masks = masks_of(model, 0.5)
        prune(model, masks)
        handle.set_support(support(model, masks))
        torch.autograd.backward(model(*make_batch(model, SEED)))
        handle.set_support(None)
    model.zero_grad()


def _nest(model: Any, handle: qsdp.Handle) -> None:
    with handle.aside():
        _evaluate(model, handle)
    _train(model, handle)
    with handle.exact():
        _evaluate(model, handle)


INSIDE: dict[str, tuple[Inside, int]] = {
    "nothing": (lambda *_: None, 0),
    "evaluation": (_evaluate, 0),
    "passes of both kinds": (_train_twice, 2),
    "another support": (_prune, 1),
    "others inside": (_nest, 1),
    "an exception in a forward pass": (_raise("forward"), 0),
    "an exception in a backward pass": (_raise("backward"), 0),
}
"""What is done, and how many steps of the keys' clock it takes."""
DELTA: dict[str, Any] = {"weight_bits": 4, "bucket_size": 64, "delta_redraw_every": 3}
STEPS = 3


def _run(how: str | None, ticks: int, reshard: bool | None) -> list[Any]:
    """All that a training leaves before whose steps something happens, its bytes too.

    Or nothing does, except that the clock goes on.
    """
    model, handle = installed(2, DELTA, reshard=reshard, frozen=True)
    optimizer = adamw(model)
    found: list[Any] = []
    for step in range(STEPS):
        if how is not None:
            with pytest.raises(Fault) if "exception" in how else nullcontext(), handle.aside():
                INSIDE[how][0](model, handle)
            model.zero_grad()
        else:
            for _ in range(ticks if dist.get_world_size() > 1 else 0):
                handle._wire.clock.before_forward()
                handle._wire.clock.before_reduce(0)
        losses = list[float]()
        found += [sent_while(handle, partial(_take, model, step, losses)), losses]
        optimizer.step()
        optimizer.zero_grad()
    weights = bits_of(decoded(model))
    return [*found, weights, bits_of(exact_state(model)), handle.state_dict()]


def _take(model: Any, step: int, losses: list[float]) -> None:
    loss = model(*make_batch(model, step))
    torch.autograd.backward(loss)
    losses.append(float(loss.detach()))


def _differing(reshard: bool | None) -> list[str]:
    """After which passes aside a training, or a byte of it, is not as without."""
    plain = [_run(None, ticks, reshard) for ticks in range(3)]
    return [how for how, (_, n) in INSIDE.items() if _run(how, n, reshard) != plain[n]]


@selection(("ranks", "reshard"), [(2, True)], (1, 2, 3), (True, None, False))
def test_a_training_is_bit_for_bit_as_if_nobody_had_been_inside(
    run: Run, ranks: int, reshard: bool | None
) -> None:
    assert run(ranks, _differing, reshard) == [[]] * ranks


def _compressed_between(how: str | None) -> list[Any]:
    """The same, where the model is compressed for a while: no aside is asked for by name."""
    model, handle = installed(3, DELTA, num_layers=1)
    found: list[Any] = []
    for step in range(STEPS):
        if how is not None:
            with qsdp.compressed(model, how), torch.no_grad():
                found.append(None)
                model(*make_batch(model, SEED))
        found.append(sent_while(handle, partial(take_sgd_step, model, step, 0.1)))
    found = [each for each in found if each is not None]
    return [*found, bits_of(decoded(model)), bits_of(exact_state(model))]


def _compressed_leaves_no_trace() -> list[bool]:
    plain = _compressed_between(None)
    return [_compressed_between(how) == plain for how in ("0.5", "2:5", "4bit")]


def test_a_model_that_is_compressed_between_steps_trains_as_if_it_had_not_been(run: Run) -> None:
    assert run(2, _compressed_leaves_no_trace) == [[True] * 3] * 2


# --- what it is for other wires, inside others, and at its ends ----------------------------------


def _weights_inside(gather: str) -> tuple[list[State], State]:
    """What gathers bring in, inside and around asides, and the exact weights."""
    model, handle = installed(4, {**FRESH, "gather": gather})
    for step in range(2):
        take_sgd_step(model, step, 0.0)
    found = []
    with handle.aside():
        found.append(decoded(model))
        with handle.aside():
            found.append(decoded(model))
            with handle.exact():
                found.append(decoded(model))
            found.append(decoded(model))
        found.append(decoded(model))
    found.append(decoded(model))
    return found, exact_state(model)


def test_exact_inside_is_exact_and_an_aside_inside_another_is_the_same(run: Run) -> None:
    once = run(2, _weights_inside, "once")
    for (found, exact), (fresh, _) in zip(run(2, _weights_inside, "delta"), once, strict=True):
        inside, nested, really_exact, again, last, outside = map(bits_of, found)
        assert inside == nested == again == last == bits_of(fresh[0])
        assert really_exact == bits_of(exact)
        differing = [name for name in inside if inside[name] != outside[name]]
        assert len(differing) == sum(value.ndim > 1 for value in exact.values())


def _with_another(gather: str, is_aside: bool) -> list[Any]:
    """All that a training leaves that takes its validations, or its second step, inside."""
    model, handle = installed(5, {"weight_bits": 4, "bucket_size": 64, "gather": gather})
    inside = handle.aside if is_aside else nullcontext
    found: list[Any] = []
    for step in range(3):
        with inside() if step == 1 else nullcontext():
            found.append(take_sgd_step(model, step, 0.1))
        with inside(), torch.no_grad():
            found.append(float(model(*make_batch(model, SEED))))
        found.append(handle.traffic.snapshot())
    return [*found, bits_of(exact_state(model)), handle.state_dict()]


def _changes_nothing() -> list[bool]:
    return [_with_another(gather, True) == _with_another(gather, False) for gather in _OTHERS]


_OTHERS = ("once", "twice")


def test_without_kept_codes_an_aside_changes_nothing(run: Run) -> None:
    assert run(2, _changes_nothing) == [[True, True]] * 2


def _half_inside(begins_inside: bool) -> tuple[str, list[bool], list[float]]:
    """What is said of a backward pass that is not where its forward pass was; what comes then."""
    model, handle = installed(6, DELTA)
    take_sgd_step(model, 0, 0.1)
    with handle.aside() if begins_inside else nullcontext():
        loss = model(*make_batch(model, 1))
    with nullcontext() if begins_inside else handle.aside():
        said = refusal_of(lambda: torch.autograd.backward(loss))
    model.zero_grad()
    same, losses = [], []
    for step in range(1, 4):
        losses.append(take_sgd_step(model, step, 0.1))
        same.append(same_on_all_ranks(decoded(model)))
    return said, same, losses


@pytest.mark.parametrize("begins_inside", [True, False])
def test_a_backward_pass_elsewhere_than_its_forward_pass_is_refused(
    run: Run, begins_inside: bool
) -> None:
    everyone = run(2, _half_inside, begins_inside)
    for said, same, losses in everyone:
        assert said == everyone[0][0]
        assert "aside" in said
        assert re.fullmatch(r"[^\n]+[^.\n]\.", said)
        assert same == [True] * 3
        assert all(loss == loss for loss in losses)


def _removed() -> list[str]:
    """What is said of an aside after ``remove``, and of exact weights."""
    model, handle = installed(7, DELTA)
    take_sgd_step(model, 0, 0.1)
    handle.remove()
    said = []
    for context in (handle.aside, handle.exact):
        with pytest.raises(RuntimeError) as raised, context():
            pass
        said.append(str(raised.value))
    return said


def test_after_remove_an_aside_is_refused_as_exact_weights_are(run: Run) -> None:
    for aside, exact in run(2, _removed):
        assert aside == exact


# --- one rank alone ------------------------------------------------------------------------------


def _in(context: str, act: Act) -> Act:
    def acts(stage: Stage) -> None:
        with getattr(stage.handle, context)():
            act(stage)

    return acts


def _leave_before_backward(stage: Stage) -> None:
    with stage.handle.aside():
        loss = stage.forward()
    torch.autograd.backward(loss)


def _enter_before_backward(stage: Stage) -> None:
    loss = stage.forward()
    with stage.handle.aside():
        torch.autograd.backward(loss)


WIRE = {"gather": "delta"}
ALONE = r"rank \d [^\n]*(aside|quantized)[^\n]*|[^\n]*aside[^\n]*"
POINTS = {
    "inside": Point(
        there=_in("aside", forward),
        elsewhere=forward,
        says=differs(FORWARD, "weights", "aside", "quantized"),
        config=WIRE,
    ),
    "outside": Point(
        before=train,
        there=train,
        elsewhere=_in("aside", train),
        says=differs(FORWARD, "weights", "quantized", "aside"),
        config=WIRE,
    ),
    "inside, where others have exact weights": Point(
        before=train,
        there=_in("aside", forward),
        elsewhere=_in("exact", forward),
        says=differs(FORWARD, "weights", "aside", "exact"),
        config=WIRE,
    ),
    "left before the backward pass": Point(
        before=train,
        there=_leave_before_backward,
        elsewhere=_in("aside", train),
        says=both(ALONE),
        config=WIRE,
    ),
    "entered before the backward pass": Point(
        before=train,
        there=_enter_before_backward,
        elsewhere=train,
        says=both(ALONE),
        config=WIRE,
    ),
}


def said(odd: int) -> dict[str, str]:
    """What this rank says at each point."""
    return say_at_each(POINTS, odd)


@selection("ranks,odd", [(2, 0)], [2, 3], [0, -1])
def test_when_one_rank_alone_is_inside_all_raise_one_sentence(
    run: Run, ranks: int, odd: int
) -> None:
    assert_said(POINTS, run(ranks, said, odd), odd)
