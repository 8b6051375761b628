"""Sums of gradients whose average over replicas ``set_requires_all_reduce(False)`` defers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from qsdp.comm.gradient_consensus import Places
from qsdp.comm.group_plan import Plan
from qsdp.common.user_errors import names_for_user
from qsdp.compat.autograd import after_backward, backward_number, is_in_backward
from qsdp.compat.parameter_group import ParameterGroup


class Waiting(NamedTuple):
    """Sums of gradients that wait for a deferred average over replicas."""

    places: Places
    """The places of the parameters."""
    total: Tensor
    number: int
    """The number of the backward pass that they are from."""


class DeferredAverage:
    """The deferred average over replicas: what waits of one group's gradients.

    It stands in the field where FSDP2 keeps what waits of its own replicas: whatever makes it
    forget a pass drops that too.

    Args:
        plan: How the group travels.
        group: FSDP2's layout of it.
    """

    def __init__(self, plan: Plan, group: ParameterGroup) -> None:
        self._plan, self._group = plan, group
        self._waiting: Waiting | None = None

    def add_to(self, reduced: Tensor, places: Places, tell_replicas: Callable[[], None]) -> None:
        """Add the sums that wait, if there are any, to the ``reduced`` gradients at ``places``.

        Raises RuntimeError where they are of other places, after ``tell_replicas`` if replicas
        wait.
        """
        waiting, self._waiting = self._waiting, None
        field = self._group.partial_reduce_output
        if waiting is None or (field is None and waiting.number != backward_number()):
            return  # the pass was cut short, or FSDP2 told to forget it
        if places != waiting.places:
            if self._group.all_reduces:
                tell_replicas()
            odd = sorted(set(places) ^ set(waiting.places))
            raise RuntimeError(
                f"{names_for_user([self._plan.names[i] for i in odd])} had a gradient in some of "
                "the backward passes since set_requires_all_reduce(False), but not in all: use "
                "the same parameters in each, or call set_reduce_scatter_unused_params(True) "
                "(torch 2.13)."
            )
        reduced += waiting.total

    def defer(self, reduced: Tensor, places: Places) -> None:
        """Let ``reduced`` wait, and FSDP2 add zeros to the gradients in its place."""
        group = self._group
        if not is_in_backward():
            raise RuntimeError(
                f"the group of {self._plan.name} is reduced outside a backward pass, where "
                "replicate_mesh cannot put the average off: leave set_requires_all_reduce(True), "
                "or shard over a 2-D mesh in place of replicate_mesh."
            )
        parameters = group.sharded_parameters()
        without = [parameters[i] for i in places if parameters[i].grad is None]
        total = reduced.clone()
        self._waiting = Waiting(places, total, backward_number())
        reduced.zero_()

        def leave() -> None:
            group.set_partial_reduce_output(total)
            for parameter in without:
                parameter.grad = None

        after_backward(leave)
