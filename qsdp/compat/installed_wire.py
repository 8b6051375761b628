"""What others than its handle ask of the wire that ``install`` has put on a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from qsdp.compat.parameter_group import parameter_groups


def passes_of(model: nn.Module) -> list[Any]:
    """The passes (qsdp/fsdp/passes.py) of the wires that are installed on ``model``."""
    comms = [group.comms()[0] for group in parameter_groups(model)]
    return list({id(c.passes): c.passes for c in comms if hasattr(c, "passes")}.values())


def pending_adaptation(model: nn.Module) -> str:
    """What the wire installed on ``model`` would learn before the next step, in words."""
    return " and ".join(passes.due for passes in passes_of(model))


def adapt_now(model: nn.Module) -> None:
    """Let the wire installed on ``model`` learn what is pending, before weights are edited."""
    for passes in passes_of(model):
        passes.settle()


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Inside, the wire installed on ``model`` sends other weights for a while: ``Handle.aside``."""
    with ExitStack() as stack:
        for passes in passes_of(model):
            stack.enter_context(passes.with_weights("is_aside"))
        yield


def rewind_point(model: nn.Module) -> Callable[[], None]:
    """A function that makes what the wire installed on ``model`` counts as it is now.

    It is for the second try of a step. Without the wire there is nothing to do.
    """
    points = [passes.rewind_point() for passes in passes_of(model)]

    def rewind() -> None:
        for point in points:
            point()

    return rewind
