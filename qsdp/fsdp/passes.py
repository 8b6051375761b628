"""Where passes of the model begin and end, and what must hold there."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qsdp.comm.group_plan import Plan
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import CollectiveError
from qsdp.common.replicas import replicated
from qsdp.compat.autograd import is_in_backward
from qsdp.compat.fsdp_state import all_states, becomes_root, is_root, stays_gathered_by_default
from qsdp.compat.interrupted_passes import abandon_interrupted_backward, abandon_pass
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.compat.pytree import tensors_in
from qsdp.compat.resharding import reshard_module
from qsdp.fsdp.backward_pass import BackwardPass
from qsdp.fsdp.bits_and_levels import Adaptation
from qsdp.fsdp.optimizer_steps import OptimizerSteps
from qsdp.fsdp.pass_agreement import BACKWARD, FORWARD, PassMeetings, PassMembers
from qsdp.fsdp.pass_facts import Facts

_SWITCH = {True: "on", False: "off"}


class Passes:
    """The passes of one handle's model.

    [Note: Passes] A pass begins with the first gather of a forward pass of what FSDP2 takes for a
    whole; elsewhere with that of a group that was gathered already since the last beginning, and
    after whatever changes what gathers send. There the ranks meet ([Note: Meeting]) on behalf of
    the whole's groups: on the step, on what is sent, and on whether any of them has edited a frozen
    shard whose payload all keep. They meet again where a backward pass reduces or gathers for the
    first time, since any of it may have changed in between. It is the ranks of a shard group that
    meet: replicas may validate on their own. Replicas meet at the beginning of backward passes that
    end with their average, and a rank that fails before that tells them there.

    An exception that ends a pass in the middle leaves FSDP2 and the wire in the middle of it. What
    is left is undone before the next pass, so that it equals one of a run without the exception:
    the step in the keys is that of the pass that was cut short, and gradients that were not reduced
    are dropped. Only what is seen to raise, or not to end, counts as cut short: a root may be
    called inside its own pass, from a method that FSDP2 was told to take for a forward.

    ``caches``, by plan, are set once they are made. ``facts`` is what ranks compare where they
    meet, ``meetings`` those of the passes.

    Args:
        plans, groups: Those of the handle.
        others: Modules that may be roots, and have no group.
        wire: What the groups share.
        adaptation: What sets bits and levels.
        replicas: The ranks that hold the same shards, where qsdp averages over them.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        groups: Sequence[ParameterGroup],
        others: Sequence[nn.Module],
        wire: Wire,
        adaptation: Adaptation,
        replicas: dist.ProcessGroup | None,
    ) -> None:
        self._plans, self._groups = plans, groups
        self._wire, self._adaptation = wire, adaptation
        self.replicas, self._averages = replicas, replicas is not None
        # A gather for the backward pass would come before anything that a meeting could lie beside.
        is_alone = len({plan.group for plan in plans}) == 1
        self._meets_early = wire.config.gather != "twice" and is_alone
        self.caches = PassMembers()
        self.facts = Facts(plans, groups, wire, adaptation, averages=self._averages)
        self.meetings = meetings = PassMeetings(plans, groups, wire, self.facts, replicas)
        self._to_come = to_come = dict[dist.ProcessGroup, set[int]]()

        def end_backward() -> None:  # without self, or what is removed would not be freed at once
            to_come.clear()
            meetings.end()

        self.backward = BackwardPass(wire.late, end_backward)
        self._optimizer_steps = OptimizerSteps(groups)
        self._parts: Sequence[int] = range(len(plans))
        self._whole: dict[int, Sequence[int]] = {}
        self._open: set[int] = set()
        self._grad_mode = "unknown"
        self._indices = {id(group.state): i for i, group in enumerate(groups)}
        self.is_removed = False
        if self._averages:
            replicated.add(self)
        self._handles: list[RemovableHandle] = []
        # A block's compiler shall not look inside. [Note: Hooks] says why the reference is weak.
        self._roots = [*(group.modules[0] for group in groups), *others]
        for place, modules in [*enumerate(group.modules for group in groups), (None, others)]:
            before, after = (
                torch.compiler.disable(partial(_call_if_alive, weakref.ref(self), method, place))
                for method in (Passes._before_forward, Passes._after_forward)
            )
            for module in modules:
                self._handles += [
                    module.register_forward_pre_hook(before, prepend=True),
                    module.register_forward_hook(after, always_call=True),
                ]

    @property
    def now(self) -> tuple[str, int]:
        """What gathered weights belong to: bits and levels, and how often optimizers stepped."""
        return self._adaptation.mark, self._optimizer_steps.num

    @property
    def trains(self) -> bool:
        """Whether a backward pass may follow the forward pass that is under way."""
        return self._grad_mode in ("on", "unknown")

    def begin_anew(self) -> None:
        """Let the next gather begin a pass."""
        self._to_come.clear()

    def before_gather(self, plan: Plan) -> None:
        """Begin a pass, if a gather of ``plan`` outside a backward pass does so."""
        self._end_what_was_cut_short()
        wire = self._wire
        to_come = self._to_come.get(plan.group, set())
        if plan.index in to_come:
            to_come.remove(plan.index)
            return
        members = self.meetings.members(plan.group, self._parts)
        self._open.update(members)
        self.caches.settle()
        with self.caches.agreeing(), self.meetings.mistakes_reach_replicas():
            self.meetings.meet_for_a_forward(plan, members, self._grad_mode, self.caches)
        self._to_come[plan.group] = {*members} - {plan.index}
        self._optimizer_steps.look_again()
        if not wire.is_exact:
            # Not in a validation: its weights may be other ones, compressed or averaged.
            if self.trains:
                self._adaptation.settle()
            wire.clock.before_forward()

    def before_collective_in_backward(self, plan: Plan) -> None:
        """Meet, if this is the first collective of a backward pass."""
        if self.backward.was_cut_short:  # this is another one's
            self._end_what_was_cut_short()
        if not self.backward.is_under_way:
            self._begin_backward(plan.group)
        whole = self._whole.get(plan.index, [plan.index])
        with self.caches.agreeing():
            self.meetings.end()
            if not self.meetings.has_spoken_of(plan):  # its forward was before another backward
                self._meet_for_a_backward(plan.group, whole)
                self.meetings.end()
        self._open.difference_update(whole)

    def _begin_backward(self, group: dist.ProcessGroup) -> None:
        """Begin the meeting of a backward pass, beside what comes before its first collective."""
        self.backward.begin()
        self.meetings.new_backward()
        # Not of other wholes, which may have had backward passes of their own.
        self._meet_for_a_backward(group, sorted(self._open) or range(len(self._plans)))

    def _meet_for_a_backward(self, group: dist.ProcessGroup, places: Sequence[int]) -> None:
        """Begin a meeting on behalf of those of ``places`` that travel over ``group``."""
        self.meetings.refuse(BACKWARD, places, group)
        self.meetings.begin_for_a_backward(group, places)

    @property
    def due(self) -> str:
        """What is due before the next pass of training; an empty text if nothing is."""
        return self._adaptation.due

    def settle(self) -> None:
        """Do what is due, with the weights as they are now: a collective if there is anything."""
        self._adaptation.settle()

    def mend(self) -> None:
        """Undo what a pass that was cut short has left behind; no pass may be under way."""
        for module in self._roots:
            abandon_interrupted_backward(module)
        self._end_what_was_cut_short()
        self._grad_mode = "unknown"

    def reshard(self) -> None:
        """Make the next pass gather everything anew: what gathers bring is about to change."""
        self.mend()
        self.begin_anew()
        torch.clear_autocast_cache()
        for group in self._groups:
            reshard_module(group.module)

    @contextmanager
    def with_weights(self, which: str) -> Iterator[None]:
        """Inside, gathers bring other weights: ``which`` of the wire's switches is on."""
        self.reshard()
        before = getattr(self._wire, which)
        setattr(self._wire, which, True)
        try:
            yield
        finally:
            try:
                self.reshard()
            finally:
                setattr(self._wire, which, before)

    def rewind_point(self) -> Callable[[], None]:
        """A function that makes what is counted as it is now, for the second try of a step."""
        clock, state = self._wire.clock, self._wire.clock.state_dict()
        adaptation = self._adaptation.rewind_point()

        def rewind() -> None:
            self._end_what_was_cut_short()
            clock.load_state_dict(state)
            adaptation()
            self.begin_anew()

        return rewind

    def remove(self) -> None:
        """Take all hooks on passes out of the model."""
        self.is_removed = True
        self._optimizer_steps.stop()
        replicated.discard(self)
        for handle in self._handles:
            handle.remove()

    def parameters(self) -> list[nn.Parameter]:
        """What optimizers hold of the groups."""
        return [p for group in self._groups for p in group.sharded_parameters()]

    def abandon_what_is_late(self) -> None:
        """Finish what a pass that was cut short has left under way."""
        self._wire.late.abandon()
        self.caches.settle()

    def settle_what_was_cut_short(self) -> None:
        """Undo what a backward pass that was cut short has counted, if one was."""
        if not is_in_backward():
            self._end_what_was_cut_short()

    def _end_what_was_cut_short(self) -> None:
        self._wire.late.abandon()
        if self.backward.is_under_way:
            self.backward.end()
            self._wire.clock.rewind()
            self._adaptation.watch_again()

    def _before_forward(self, place: int | None, module: nn.Module, *_: object) -> None:
        if is_in_backward():
            return
        if not becomes_root(module):
            if place is None:
                return
            group = self._plans[place].group
            is_spoken_of = place in self._to_come.get(group, ())
            self.meetings.refuse(FORWARD, [place], None if is_spoken_of else group)
            return
        abandon_interrupted_backward(module)
        self._end_what_was_cut_short()
        states = map(id, all_states(module))
        parts = [self._indices[state] for state in states if state in self._indices]
        self.begin_anew()
        self._parts = parts
        self._whole.update(dict.fromkeys(parts, parts))
        self._open.update(parts)  # without gradients too: it may be recomputed in a backward pass
        self.meetings.refuse(FORWARD, parts, self._plans[parts[0]].group if parts else None)
        is_inference = torch.is_inference_mode_enabled()
        self._grad_mode = "in inference mode" if is_inference else _SWITCH[torch.is_grad_enabled()]
        # What is due with all ranks waits for a gather, so that they have met before.
        trains = torch.is_grad_enabled() and not self._wire.is_exact
        is_due = trains and bool(self.due)
        if trains and not is_due:
            self.settle()
        for i in parts:
            self.caches[i].drop_stale(is_due)
            if self.trains:
                self.caches[i].note_side()
            if is_inference:
                self._groups[i].init_unsharded_parameters()

    def _after_forward(
        self, _: int | None, module: nn.Module, args: object = None, output: object = None
    ) -> None:
        if is_in_backward() or not is_root(module):
            return
        self._grad_mode = "unknown"
        parts, self._parts = self._parts, range(len(self._plans))
        error = sys.exc_info()[1]
        if output is None and error is not None:
            self._open.difference_update(parts)
            if not isinstance(error, CollectiveError):  # no rank would answer
                abandon_pass(module)
            return
        if torch.is_grad_enabled() and self._meets_early:
            for tensor in tensors_in(output):
                # A leaf, a parameter for one, outlives the pass, and would gather hooks.
                if tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(partial(_gradient_came, weakref.ref(self)))
        # Nobody else would, and ``model.parameters()`` would show decoded weights.
        if not torch.is_grad_enabled() and stays_gathered_by_default(module):
            reshard_module(module)


def _call_if_alive(passes: weakref.ref[Passes], method: Any, *args: object) -> None:
    if (found := passes()) is not None:
        method(found, *args)


def _gradient_came(passes: weakref.ref[Passes], _: Tensor) -> None:
    found = passes()
    if found is None or found.is_removed:  # since the forward pass
        return
    if not found.backward.is_under_way and is_in_backward():
        found._begin_backward(found._plans[0].group)
