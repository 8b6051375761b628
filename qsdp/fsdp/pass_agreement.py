"""Where ranks meet in a pass, and what they tell each other there: edits, hooks and mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from qsdp.comm.group_plan import Plan
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import collective
from qsdp.common.rank_agreement import FactsDiffer, Meeting, meet, mistakes_shared
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.compat.process_groups import control_device
from qsdp.compat.torch_collectives import all_gather_single
from qsdp.fsdp.changed_settings import mistake
from qsdp.fsdp.pass_facts import KEPT_CODES, Facts

FORWARD, BACKWARD = "a forward pass", "a backward pass"
"""What the calls of these meetings are called."""


class PassMember(Protocol):
    """A group that takes part in the agreement of a pass: what it is asked of frozen payloads."""

    @property
    def has_frozen(self) -> bool:
        """Whether there are any."""

    def frozen_changed(self) -> bool:
        """Whether this rank's shards are other ones than those that were sent."""

    def forget_frozen(self) -> None:
        """Send them anew with the next gather."""

    def settle(self) -> None:
        """Apply what has arrived of the weights' changes, if any is under way."""

    def forget_codes(self) -> None:
        """Draw all weights anew with the next gather, as all ranks do."""

    def drop_stale(self, is_due: bool) -> None:
        """Free gathered weights that are not made of the weights, bits and levels of now.

        ``is_due``: also those that what is due before the next step would leave as they are.
        """

    def note_side(self) -> None:
        """Remember whether a forward pass that a backward pass may follow is in an aside."""


class PassMembers(tuple[PassMember, ...]):
    """All members of a handle's passes."""

    def settle(self) -> None:
        """Apply what has arrived of the weights' changes: [Note: Kept]."""
        for member in self:
            member.settle()

    def forget_codes(self) -> None:
        """Let all groups draw their weights anew with the next gather, as all ranks do."""
        for member in self:
            member.forget_codes()

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Inside ranks meet: where they keep other codes than each other, all forget them."""
        try:
            yield
        except FactsDiffer as error:
            if error.is_about(KEPT_CODES):
                self.forget_codes()
            raise


class PassMeetings:
    """Where ranks meet in one handle's passes, to agree: [Note: Passes] says when.

    ``comms`` is set once it is made: by plan, what FSDP2 was given.

    Args:
        plans, groups: Those of the handle; members are places in these.
        wire: What the groups share.
        facts: What is compared.
        replicas: The ranks that hold the same shards, where qsdp averages over them.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        groups: Sequence[ParameterGroup],
        wire: Wire,
        facts: Facts,
        replicas: dist.ProcessGroup | None,
    ) -> None:
        self._plans, self._groups, self._wire, self._facts = plans, groups, wire, facts
        self._averages = replicas is not None
        self.comms: Sequence[tuple[Any, ...]] = ()
        axes = {group.replica_group for group in groups} if replicas is None else {replicas}
        # Elsewhere nobody would read what is said.
        self._replicas = [
            axis
            for axis in (axes if len(axes) == 1 else ())
            if axis is not None and control_device(axis).type == "cpu"
        ]
        self._agreed: dict[tuple[int, ...], dict[str, object]] = {}
        self._meeting: tuple[Meeting, Sequence[int], dist.ProcessGroup] | None = None
        self._spoken_of: set[int] = set()
        self._shown: set[int] = set()

    def members(self, group: dist.ProcessGroup, places: Sequence[int]) -> list[int]:
        """Those of ``places`` whose groups travel over ``group``."""
        return [i for i in places if self._plans[i].group == group]

    def mistakes_reach_replicas(self) -> AbstractContextManager[None]:
        """Inside, outside a backward pass, a mistake also reaches the replicas that wait there."""
        return mistakes_shared(BACKWARD, self._replicas)

    def refuse(self, call: str, places: Iterable[int], group: dist.ProcessGroup | None) -> None:
        """Refuse what takes a group at ``places`` off the wire, or its gradients to other sums.

        The ranks of ``group`` are about to meet at ``call``; None where nobody would hear.
        """
        found = (
            mistake(
                self._plans[place],
                self._groups[place],
                self.comms[place],
                averages=self._averages,
                in_backward=call == BACKWARD,
            )
            for place in places
        )
        if first := next(filter(None, found), ""):
            told = [] if group is None or control_device(group).type != "cpu" else [group]
            with self.mistakes_reach_replicas(), mistakes_shared(call, told):
                raise RuntimeError(first)

    def meet_for_a_forward(
        self, first: Plan, members: list[int], grad_mode: str, caches: Sequence[PassMember]
    ) -> None:
        """Agree on all that the gathers of ``members`` in a pass depend on.

        All ranks forget frozen payloads that any of them has edited.

        Args:
            first: The plan that is gathered now, one of the members.
            members: All plans that are gathered in the pass.
            grad_mode: The mode of autograd, in words.
            caches: The cache of each plan.
        """
        wire, group = self._wire, first.group
        facts = self._facts.of_forward(first, members, grad_mode)
        has_news, is_needed = False, False
        if wire.gathers(wire.clock.next_step) == "once":
            kept = [i for i in members if caches[i].has_frozen]
            evaluated = [i for i in members if not self._groups[i].modules[0].training]
            facts["groups in eval mode"] = tuple(self._plans[i].name for i in evaluated)
            facts["kept payloads"] = tuple(self._plans[i].name for i in kept)
            changed = [] if wire.is_exact else [i for i in kept if caches[i].frozen_changed()]
            has_news, is_needed = bool(changed), bool(kept)
        # A GPU's stream is stopped only where something is to be heard.
        is_read = is_needed or facts != self._agreed.get(tuple(members))
        now = {"step": wire.clock.next_step, **facts}
        if meet(FORWARD, now, [group], has_news=has_news, is_read=is_read):
            edited = "frozen parameters that were edited"
            for i in self._on_any_rank(changed, group, edited):
                caches[i].forget_frozen()
        self._agreed[tuple(members)] = facts

    def new_backward(self) -> None:
        """Begin a backward pass: no meeting was on behalf of any group yet."""
        self._spoken_of.clear()
        self._shown.clear()

    def begin_for_a_backward(self, group: dist.ProcessGroup, places: Sequence[int]) -> None:
        """Begin a meeting of a backward pass for those of ``places`` that travel over ``group``.

        It takes place beside what comes before its first collective.
        """
        members = self.members(group, places)
        self._spoken_of.update(members)
        if control_device(group).type == "cpu":  # else nobody would read what is said
            facts = self._facts.of_backward(members)
            shown = [i for i in members if self._is_shown(self._groups[i])]
            meeting = Meeting(BACKWARD, facts, [group], has_news=bool(shown))
            self._meeting = meeting, shown, group

    def end(self) -> None:
        """Wait for the meeting that has begun, if one has."""
        begun, self._meeting = self._meeting, None
        if begun is None:
            return
        meeting, shown, group = begun
        with self.mistakes_reach_replicas():
            if meeting.end():
                hooked = "groups whose gradients have hooks"
                self._shown.update(self._on_any_rank(shown, group, hooked))
        averaged = (
            g.reduces and g.all_reduces and self._facts.is_replicated(g) for g in self._groups
        )
        if self._replicas and any(averaged):
            meet(BACKWARD, self._facts.of_average(), self._replicas)

    def has_spoken_of(self, plan: Plan) -> bool:
        """Whether a meeting of this backward pass was on behalf of ``plan``."""
        return plan.index in self._spoken_of

    def may_be_late(self, plan: Plan) -> bool:
        """Whether no rank has a hook that is shown the gradients of ``plan`` in this backward pass.

        In the middle of it: an optimizer's would step with those that are to be refused.
        """
        return plan.index not in self._shown

    def _is_shown(self, group: ParameterGroup) -> bool:
        """Whether hooks keep its reduces from being left under way, which others' could be."""
        is_flat = not self._facts.is_replicated(group) and group.mesh.device_type == "cpu"
        return is_flat and group.has_gradient_hooks

    def _on_any_rank(self, places: Sequence[int], group: dist.ProcessGroup, what: str) -> list[int]:
        """The groups that are among ``places`` on some rank of ``group``."""
        own = torch.zeros(len(self._plans), dtype=torch.uint8, device=control_device(group))
        own[list(places)] = 1
        everyone = own.new_empty(group.size() * own.numel())
        with collective(f"exchange of {what}"):
            all_gather_single(everyone, own, group)
        found: list[int] = everyone.view(group.size(), -1).any(0).nonzero().squeeze(1).tolist()
        return found
