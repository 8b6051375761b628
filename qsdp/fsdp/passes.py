"""Where passes of the model begin and end, and what must hold there."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from qsdp import compat
from qsdp.comm.group_plan import Plan
from qsdp.comm.wire_state import Wire
from qsdp.common.failures import CollectiveError, collective, listed
from qsdp.common.meeting import Meeting, meet, mistakes_shared
from qsdp.common.meshes import averaged
from qsdp.fsdp.adapt import Adaptation

_FORWARD, _BACKWARD = "a forward pass", "a backward pass"
_SWITCH = {True: "on", False: "off"}
_HOOK = "set_all_reduce_hook"
_SETTERS = (
    "set_custom_all_gather",
    "set_custom_reduce_scatter",
    "set_force_sum_reduction_for_comms(False)",
    _HOOK,
)


class Cache(Protocol):
    """What passes must know of the payloads of frozen parameters that a group keeps."""

    @property
    def has_frozen(self) -> bool:
        """Whether there are any."""

    def frozen_changed(self) -> bool:
        """Whether this rank's shards are other ones than those that were sent."""

    def forget_frozen(self) -> None:
        """Send them anew with the next gather."""

    def drop_stale(self, is_due: bool) -> None:
        """Free gathered weights that are not made of the weights, bits and levels of now;
        ``is_due``: also those that what is due before the next step would leave as they are."""


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
    the step in the keys is that of the pass that was cut short, and gradients that were not
    reduced are dropped. Only what is seen to raise, or not to end, counts as cut short: a root may
    be called inside its own pass, from a method that FSDP2 was told to take for a forward.

    Args:
        plans, groups: of the handle's groups.
        wire: what they share.
        adaptation: of bits and levels.
        replicas: the ranks that hold the same shards, where qsdp averages over them.

    Attributes:
        caches: by plan; set once they are made.
        comms: by plan, what FSDP2 was given; set then too.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        groups: Sequence[compat.ParameterGroup],
        wire: Wire,
        adaptation: Adaptation,
        replicas: dist.ProcessGroup | None,
    ) -> None:
        self._plans, self._groups = plans, groups
        self._wire, self._adaptation = wire, adaptation
        self.replicas = replicas
        self._averages = replicas is not None
        axes = {replicas} if self._averages else {group.replica_group for group in groups}
        # Elsewhere nobody would read what is said.
        self._replicas = [
            axis
            for axis in (axes if len(axes) == 1 else ())
            if axis is not None and compat.device_of(axis).type == "cpu"
        ]
        # A gather for the backward pass would come before anything that a meeting could lie beside.
        is_alone = len({plan.group for plan in plans}) == 1
        self._meets_early = wire.config.gather == "once" and is_alone
        self.caches: Sequence[Cache] = ()
        self.comms: Sequence[tuple[Any, ...]] = ()
        self._to_come: dict[dist.ProcessGroup, set[int]] = {}
        self._parts: Sequence[int] = range(len(plans))
        self._agreed: dict[tuple[int, ...], dict[str, object]] = {}
        self._is_in_backward = False
        self._ends_late = False
        self._number = -1
        self._running: Callable[[], _End | None] = lambda: None
        self._meeting: tuple[Meeting, Sequence[int], dist.ProcessGroup] | None = None
        self._whole: dict[int, Sequence[int]] = {}
        self._open: set[int] = set()
        self._spoken_of: set[int] = set()
        self._shown: set[int] = set()
        self._grad_mode = "unknown"
        self._num_edits = 0
        self._indices = {id(group.state): i for i, group in enumerate(groups)}
        self._own: set[int] | None = None
        _LIVE.add(self)
        if self._averages:
            averaged.add(self)
        self._handles: list[RemovableHandle] = []
        # A block's compiler shall not look inside. [Note: Hooks] says why the reference is weak.
        for place, group in enumerate(groups):
            before, after = (
                torch.compiler.disable(partial(_call, weakref.ref(self), method, place))
                for method in (Passes._before_forward, Passes._after_forward)
            )
            for module in group.modules:
                self._handles += [
                    module.register_forward_pre_hook(before, prepend=True),
                    module.register_forward_hook(after, always_call=True),
                ]

    @property
    def now(self) -> tuple[str, int]:
        """What gathered weights belong to: bits and levels, and what optimizers had made of the
        weights."""
        return self._adaptation.mark, self._num_edits

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
        members = self._members(plan.group, self._parts)
        self._open.update(members)
        with self.mistakes_reach_replicas():
            self._meet_for_a_pass(plan, members)
        self._to_come[plan.group] = {*members} - {plan.index}
        self._own = None
        if not wire.is_exact:
            # Not in a validation: its weights may be other ones, compressed or averaged.
            if self._grad_mode in ("on", "unknown"):
                self._adaptation.settle()
            wire.clock.before_forward()

    def before_collective_in_backward(self, plan: Plan) -> None:
        """Meet, if it is the first of a backward pass."""
        if self._is_in_backward and self._running() is None:  # another one's: it was cut short
            self._end_what_was_cut_short()
        if not self._is_in_backward:
            self._begin_backward(plan.group)
        self._end_meeting()
        whole = self._whole.get(plan.index, [plan.index])
        if plan.index not in self._spoken_of:  # its forward pass was before another backward pass
            self._meet_for_a_backward(plan.group, whole)
            self._end_meeting()
        self._open.difference_update(whole)

    def _begin_backward(self, group: dist.ProcessGroup) -> None:
        """Begin the meeting of a backward pass, beside what comes before its first collective."""
        self._is_in_backward, self._ends_late = True, False
        self._number = compat.backward_number()
        # autograd alone holds it, until its pass has ended, or was cut short.
        end = _End(self)
        self._running = weakref.ref(end)
        compat.after_backward(end)
        del end  # a traceback of what follows would hold it
        self._spoken_of.clear()
        self._shown.clear()
        # Not of other wholes, which may have had backward passes of their own.
        self._meet_for_a_backward(group, sorted(self._open) or range(len(self._plans)))

    def _meet_for_a_backward(self, group: dist.ProcessGroup, places: Sequence[int]) -> None:
        """Begin a meeting on behalf of those of ``places`` that travel over ``group``."""
        self._refuse(_BACKWARD, places, group)
        members = self._members(group, places)
        self._spoken_of.update(members)
        if compat.device_of(group).type == "cpu":  # else nobody would read what is said
            facts = self._facts_of_backward(members)
            shown = [i for i in members if self._is_shown(self._groups[i])]
            meeting = Meeting(_BACKWARD, facts, [group], has_news=bool(shown))
            self._meeting = meeting, shown, group

    def _end_meeting(self) -> None:
        begun, self._meeting = self._meeting, None
        if begun is None:
            return
        meeting, shown, group = begun
        with self.mistakes_reach_replicas():
            if meeting.end():
                hooked = "groups whose gradients have hooks"
                self._shown.update(self._on_any_rank(shown, group, hooked))
        averaged = (g.reduces and g.all_reduces and self._is_replicated(g) for g in self._groups)
        if self._replicas and any(averaged):
            meet(_BACKWARD, self._facts_of_average(), self._replicas)

    def mistakes_reach_replicas(self) -> AbstractContextManager[None]:
        """Inside, outside a backward pass, a mistake also reaches the replicas that wait there."""
        return mistakes_shared(_BACKWARD, self._replicas)

    def _facts_of_backward(self, members: Sequence[int]) -> dict[str, object]:
        """What the collectives of ``members`` in a backward pass depend on."""
        step = {"step": self._wire.clock.step}
        return {**step, **self.facts(members), **self._settings(members, is_forward=False)}

    def _facts_of_average(self) -> dict[str, object]:
        """What the average over the replicas depends on."""
        facts = self._facts_of_backward(range(len(self._plans)))
        own = ("step", "bits and levels", "the seed", "masks") if self._averages else ()
        words = (*own, "frozen parameters", "groups that are not reduced")
        return {each: facts[each] for each in (*words, "groups that are not averaged")}

    @property
    def due(self) -> str:
        """What is due before the next pass of training; nothing: an empty text."""
        return self._adaptation.due

    def settle(self) -> None:
        """Do it, with the weights as they are now: a collective if there is anything."""
        self._adaptation.settle()

    def mend(self) -> None:
        """Undo what a pass that was cut short has left behind; no pass may be under way."""
        for group in self._groups:
            self._abandon(group.modules[0])
        self._end_what_was_cut_short()
        self._grad_mode = "unknown"

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
        _LIVE.discard(self)
        averaged.discard(self)
        for handle in self._handles:
            handle.remove()

    def parameters(self) -> list[nn.Parameter]:
        """What optimizers hold of the groups."""
        return [p for group in self._groups for p in group.sharded_parameters()]

    def _is_shown(self, group: compat.ParameterGroup) -> bool:
        """Whether hooks keep its reduces from being left under way, which others could be."""
        is_flat = not self._is_replicated(group) and group.mesh.device_type == "cpu"
        return is_flat and group.shows_gradients

    def _is_replicated(self, group: compat.ParameterGroup) -> bool:
        return self._averages or group.replicas > 1

    def _refuse(self, call: str, places: Iterable[int], group: dist.ProcessGroup | None) -> None:
        """Refuse what takes a group at ``places`` off the wire, or its gradients to other sums.
        ``group``: whose ranks are about to meet at ``call``; None where nobody would hear."""
        mistakes = (self._mistake(place, call == _BACKWARD) for place in places)
        if mistake := next(filter(None, mistakes), ""):
            told = [] if group is None or compat.device_of(group).type != "cpu" else [group]
            with self.mistakes_reach_replicas(), mistakes_shared(call, told):
                raise RuntimeError(mistake)

    def _mistake(self, place: int, in_backward: bool) -> str:
        plan, own = self._plans[place], self._groups[place]
        kept = zip(_SETTERS, own.comms(), self.comms[place], strict=False)
        changed = [setter for setter, now, then in kept if now is not then]
        if not self._averages and _HOOK in changed:
            changed.remove(_HOOK)  # it is the user's
        if changed:
            return (
                f"{changed[0]} was called on the group of {plan.name} after qsdp.install, which "
                "needs that for the wire: leave it out, or call handle.remove() first"
            )
        if plan.hops is not None and own.reduces_apart:
            return (
                f"set_separate_reduce_scatter_group was called on the group of {plan.name}, which "
                "reduces in two hops, over process groups of qsdp's own: leave it out, or take "
                'QSDPConfig(reduce="flat")'
            )
        puts_off = in_backward and self._averages and own.reduces and not own.all_reduces
        if puts_off and (hooked := own.parameters_with_hooks()):
            return (
                f"{listed([plan.names[i] for i in sorted(hooked)])} has a hook on its gradient, "
                "which would find zeros while set_requires_all_reduce(False) puts the average over "
                "replicate_mesh off: remove the hook, or leave set_requires_all_reduce(True)"
            )
        return ""

    def _abandon(self, module: nn.Module) -> None:
        if compat.is_backward_cut_short(module):
            compat.abandon_pass(module)

    def may_be_late(self, plan: Plan) -> bool:
        """Whether no rank has a hook that is shown the gradients of ``plan`` in the middle of this
        backward pass: an optimizer's would step with those that are to be refused."""
        return plan.index not in self._shown

    def end_late(self) -> None:
        """See to it that what is left under way is finished, or refused, when the backward pass
        ends: on all ranks in one place, also those that have left nothing."""
        is_whole = compat.backward_number() == self._number  # not one inside, which recomputes
        self._ends_late |= is_whole
        compat.after_backward(partial(self._end_what_is_late, is_whole))

    def _end_what_is_late(self, is_whole: bool) -> None:
        self._wire.late.end()  # if it raises, the pass counts as cut short
        if is_whole:
            self._ends_late = False
            self._end_backward()

    def abandon_what_is_late(self) -> None:
        """Finish what a pass that was cut short has left under way."""
        self._wire.late.abandon()

    def settle_what_was_cut_short(self) -> None:
        """Undo what a backward pass that was cut short has counted, if one was."""
        if not compat.in_backward():
            self._end_what_was_cut_short()

    def _end_what_was_cut_short(self) -> None:
        self.abandon_what_is_late()
        if self._is_in_backward:
            self._end_backward()
            self._wire.clock.rewind()
            self._adaptation.watch_again()

    def _end_backward(self) -> None:
        self._is_in_backward = False
        self.begin_anew()
        self._end_meeting()

    def _members(self, group: dist.ProcessGroup, places: Sequence[int]) -> list[int]:
        """Those of ``places`` whose groups travel over ``group``."""
        return [i for i in places if self._plans[i].group == group]

    def _meet_for_a_pass(self, first: Plan, members: list[int]) -> None:
        """Agree on all that the gathers of ``members`` in a pass depend on, the ``first`` among
        them."""
        wire, config, group = self._wire, self._wire.config, first.group
        facts: dict[str, object] = {
            "the first group": first.name,
            "gradients": self._grad_mode,
            **self.facts(members),
            **self._settings(members, is_forward=True),
            "due before it": self.due or "nothing",
        }
        has_news, is_needed = False, False
        if config.gather == "once":
            kept = [i for i in members if self.caches[i].has_frozen]
            evaluated = [i for i in members if not self._groups[i].modules[0].training]
            facts["groups in eval mode"] = tuple(self._plans[i].name for i in evaluated)
            facts["kept payloads"] = tuple(self._plans[i].name for i in kept)
            changed = [] if wire.is_exact else [i for i in kept if self.caches[i].frozen_changed()]
            has_news, is_needed = bool(changed), bool(kept)
        # A GPU's stream is stopped only where something is to be heard.
        is_read = is_needed or facts != self._agreed.get(tuple(members))
        now = {"step": wire.clock.next_step, **facts}
        if meet(_FORWARD, now, [group], has_news=has_news, is_read=is_read):
            edited = "frozen parameters that were edited"
            for i in self._on_any_rank(changed, group, edited):
                self.caches[i].forget_frozen()
        self._agreed[tuple(members)] = facts

    def facts(self, members: Sequence[int]) -> dict[str, object]:
        """What payloads of ``members`` depend on, in both directions."""
        wire = self._wire
        return {
            "weights": "exact" if wire.is_exact else "quantized",
            "bits and levels": self._adaptation.mark,
            "the seed": wire.clock.seed,
            "masks": f"of call {wire.support} of set_support" if wire.support else "lifted",
            "frozen parameters": tuple(
                name
                for i in members
                for name, is_trained in zip(
                    self._plans[i].names, self._groups[i].requires_grad(), strict=True
                )
                if not is_trained
            ),
        }

    def _settings(self, members: Sequence[int], *, is_forward: bool) -> dict[str, object]:
        """What FSDP2 was told of ``members`` that decides which collectives there are in a pass,
        and in which order."""
        found: dict[str, list[str]] = {}
        for plan, group in ((self._plans[i], self._groups[i]) for i in members):
            if is_forward:
                settings = {
                    "groups that stay gathered for the backward": not group.reshards_after_forward,
                    "groups that stay gathered after the backward": (
                        not group.reshards_after_backward
                    ),
                }
            else:
                settings = {
                    "groups that are not reduced": not group.reduces,
                    "groups that are not averaged": (
                        self._is_replicated(group) and not group.all_reduces
                    ),
                    "groups that are not gathered again": not group.gathers_in_backward,
                    "gathered groups": group.is_gathered,
                }
            for words, is_so in settings.items():
                found.setdefault(words, []).extend([plan.name] if is_so else [])
            found.setdefault("groups that are gathered ahead", []).extend(
                f"{self._name_of(state)} from {plan.name} on"
                for state in group.prefetches[not is_forward]
            )
        return {words: tuple(groups) for words, groups in found.items()}

    def _name_of(self, state: object) -> str:
        place = self._indices.get(id(state))
        return "another" if place is None else self._plans[place].name

    def _on_any_rank(self, places: Sequence[int], group: dist.ProcessGroup, what: str) -> list[int]:
        """The groups that are among ``places`` on some rank of ``group``."""
        own = torch.zeros(len(self._plans), dtype=torch.uint8, device=compat.device_of(group))
        own[list(places)] = 1
        everyone = own.new_empty(group.size() * own.numel())
        with collective(f"exchange of {what}"):
            compat.all_gather(everyone, own, group)
        found: list[int] = everyone.view(group.size(), -1).any(0).nonzero().squeeze(1).tolist()
        return found

    def _before_forward(self, place: int, module: nn.Module, *_: object) -> None:
        if compat.in_backward():
            return
        if not compat.becomes_root(module):
            group = self._plans[place].group
            is_spoken_of = place in self._to_come.get(group, ())
            self._refuse(_FORWARD, [place], None if is_spoken_of else group)
            return
        self._abandon(module)
        self._end_what_was_cut_short()
        states = map(id, compat.parts(module))
        parts = [self._indices[state] for state in states if state in self._indices]
        self.begin_anew()
        self._parts = parts
        self._whole.update(dict.fromkeys(parts, parts))
        self._open.update(parts)  # without gradients too: it may be recomputed in a backward pass
        self._refuse(_FORWARD, parts, self._plans[parts[0]].group if parts else None)
        is_inference = torch.is_inference_mode_enabled()
        self._grad_mode = "in inference mode" if is_inference else _SWITCH[torch.is_grad_enabled()]
        # What is due with all ranks waits for a gather, so that they have met before.
        trains = torch.is_grad_enabled() and not self._wire.is_exact
        is_due = trains and bool(self.due)
        if trains and not is_due:
            self.settle()
        for i in parts:
            self.caches[i].drop_stale(is_due)
            if is_inference:
                self._groups[i].make_buffers()

    def _after_forward(
        self, _: int, module: nn.Module, args: object = None, output: object = None
    ) -> None:
        if compat.in_backward() or not compat.is_root(module):
            return
        self._grad_mode = "unknown"
        parts, self._parts = self._parts, range(len(self._plans))
        error = sys.exc_info()[1]
        if output is None and error is not None:
            self._open.difference_update(parts)
            if not isinstance(error, CollectiveError):  # no rank would answer
                compat.abandon_pass(module)
            return
        if torch.is_grad_enabled() and self._meets_early:
            for tensor in compat.tensors_in(output):
                # A leaf, a parameter for one, outlives the pass, and would gather hooks.
                if tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(partial(_gradient_came, weakref.ref(self)))
        # Nobody else would, and `model.parameters()` would show decoded weights.
        if not torch.is_grad_enabled() and compat.stays_gathered_by_default(module):
            compat.reshard_module(module)


class _End:
    """What ends a backward pass; it is gone when the pass is, however that ended."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def __call__(self) -> None:
        if not self._passes._ends_late:  # else what does so comes later
            self._passes._end_what_is_late(True)


_LIVE: WeakSet[Passes] = WeakSet()


def _count_edit(optimizer: torch.optim.Optimizer, *_: object) -> None:
    edited = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for passes in _LIVE:
        if passes._own is None:  # once a pass: some users have an optimizer a parameter
            passes._own = {*map(id, passes.parameters())}
        passes._num_edits += not edited.isdisjoint(passes._own)


register_optimizer_step_post_hook(_count_edit)  # one for all optimizers: it holds no model


def _call(passes: weakref.ref[Passes], method: Any, *args: object) -> None:
    if (found := passes()) is not None:
        method(found, *args)


def _gradient_came(passes: weakref.ref[Passes], _: Tensor) -> None:
    found = passes()
    if found is None or found not in _LIVE:  # removed since the forward pass
        return
    if not found._is_in_backward and compat.in_backward():
        found._begin_backward(found._plans[0].group)
