"""Passes beside the training leave no trace in it where changes are sent, and cost next to nothing.

Whoever gathers first in a step brings the changes; a further gather has none to bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import qsdp
from tests_distributed.support.delta import (
    HEADER_BYTES,
    decoded,
    installed,
    other_weights,
    sent_while,
)
from tests_distributed.support.helpers import make_batch
from tests_distributed.support.interruptions import bytes_of
from tests_distributed.support.running import Run, selection
from tests_distributed.support.training import adamw, exact_state

STEPS = 3
MICRO_BATCHES = 2
NUM_GROUPS = 3
SEED = 100


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def _in(context: Callable[[], Any], num_batches: int = 1) -> Callable[[Any, qsdp.Handle], int]:
    """Passes in a context; returns how many gathered as training does."""

    def validate(model: Any, _: qsdp.Handle) -> int:
        for i in range(num_batches):
            with context():
                model(*make_batch(model, SEED + i))
        return num_batches

    return validate


def _evaluate(model: Any, handle: qsdp.Handle) -> int:
    return _in(lambda: _evaluating(model))(model, handle)


def _exact(model: Any, handle: qsdp.Handle) -> int:
    with handle.exact(), torch.no_grad():
        model(*make_batch(model, SEED))
    return 0


def _aside(model: Any, handle: qsdp.Handle) -> int:
    """Other weights are evaluated: a moving average, say."""
    with handle.aside(), torch.no_grad(), other_weights(model):
        model(*make_batch(model, SEED))
    return 0


def _exact_and_not(model: Any, handle: qsdp.Handle) -> int:
    return _in(torch.no_grad)(model, handle) + _exact(model, handle)


def _look(model: Any, handle: qsdp.Handle) -> int:
    decoded(model)
    return 1


PASSES: dict[str, Callable[[Any, qsdp.Handle], int]] = {
    "inference": _in(torch.inference_mode),
    "evaluation": _evaluate,
    "three batches": _in(torch.no_grad, num_batches=3),
    "exact": _exact,
    "aside": _aside,
    "no gradients, then exact": _exact_and_not,
    "unshard": _look,
}
TIMES = ("between steps", "between micro-batches", "before the backward pass")


def _trained(when: str, how: str, reshard: bool) -> dict[str, Any]:
    """What a training leaves, the bytes of its gathers, and how many passes came beside it."""
    model, handle = installed(
        5,
        {"bucket_size": 64, "delta_redraw_every": 2, "weight_bits": 4},
        reshard=reshard,
        num_layers=1,
        frozen=True,
    )
    optimizer = adamw(model)
    losses = []
    passes, apart, in_backward = 0, 0, 0

    def beside(now: str) -> None:
        nonlocal passes, apart
        if now == when:
            num = 0

            def act() -> None:
                nonlocal num
                num = PASSES[how](model, handle)

            sent = sent_while(handle, act)["gather_sent_bytes"]
            passes += num
            apart += 0 if num else sent

    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            model.set_requires_gradient_sync(micro == MICRO_BATCHES - 1)
            loss = model(*make_batch(model, 2 * step + micro))
            beside("before the backward pass")
            backward = partial(torch.autograd.backward, loss)
            in_backward += sent_while(handle, backward)["gather_sent_bytes"]
            losses.append(float(loss.detach()))
            if not micro:
                beside("between micro-batches")
        optimizer.step()
        optimizer.zero_grad()
        beside("between steps")
    sent = handle.traffic.snapshot()["gather_sent_bytes"]
    state = {name: bytes_of(value) for name, value in exact_state(model).items()}
    return {
        "numbers": (losses, state),
        "sent": sent - apart,
        "passes": passes,
        "in backward": in_backward,
    }


def _compared(when: str, reshard: bool) -> tuple[list[str], list[str], list[int]]:
    """What differs from a training without passes beside it, what costs more, backward bytes."""
    plain = _trained("never", "", reshard)
    differing, costly, in_backward = [], [], [plain["in backward"]]
    for how in PASSES:
        found = _trained(when, how, reshard)
        if found["numbers"] != plain["numbers"]:
            differing.append(how)
        free = HEADER_BYTES * NUM_GROUPS * (dist.get_world_size() - 1)
        if how != "no gradients, then exact" and found["sent"] - plain["sent"] > (
            free * (found["passes"] + STEPS)
        ):
            costly.append(f"{how}: {found['sent'] - plain['sent']} bytes, {found['passes']} passes")
        in_backward.append(found["in backward"])
    return differing, costly, in_backward


@selection(
    ("when", "reshard"),
    [("between steps", False), ("before the backward pass", True)],
    TIMES,
    (True, False),
)
def test_passes_beside_a_training_leave_no_trace_and_send_headers_alone(
    run: Run, when: str, reshard: bool
) -> None:
    for differing, costly, in_backward in run(2, _compared, when, reshard):
        assert differing == []
        assert costly == []
        assert {*in_backward} == {0}
