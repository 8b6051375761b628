"""What the collectives of a pass depend on, in words that ranks compare before they enter them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch.distributed as dist

from qsdp.comm.group_plan import Plan
from qsdp.comm.wire_state import Wire
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.fsdp.bits_and_levels import Adaptation

KEPT_CODES = "the digest of kept codes"
"""What the fact is called by which a rank that has missed a frame is found."""


class Facts:
    """The facts of a pass: one handle's model as it is now, in words to compare: [Note: Meeting].

    Args:
        plans, groups: Those of the handle; members are places in these.
        wire: What the groups share.
        adaptation: What sets bits and levels.
        averages: Whether qsdp averages over replicas.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        groups: Sequence[ParameterGroup],
        wire: Wire,
        adaptation: Adaptation,
        *,
        averages: bool,
    ) -> None:
        self._plans, self._groups = plans, groups
        self._wire, self._adaptation, self._averages = wire, adaptation, averages
        self._indices = {id(group.state): i for i, group in enumerate(groups)}

    def is_replicated(self, group: ParameterGroup) -> bool:
        """Whether gradients of ``group`` are averaged over replicas, qsdp's or FSDP2's."""
        return self._averages or group.replicas > 1

    def of_step(self) -> dict[str, object]:
        """What the ranks have come to, between two passes."""
        return {
            "step": self._wire.clock.next_step,
            "bits and levels": self._adaptation.mark,
            "due before it": self._adaptation.due or "nothing",
        }

    def of_payloads(self, members: Sequence[int]) -> dict[str, object]:
        """What payloads of ``members`` depend on, in both directions."""
        wire = self._wire
        return {
            "weights": "exact" if wire.is_exact else "aside" if wire.is_aside else "quantized",
            "bits and levels": self._adaptation.mark,
            "the seed": wire.clock.seed,
            KEPT_CODES: self._kept_codes(members),
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

    def _kept_codes(self, members: Sequence[int]) -> str:
        """What all that was sent of the weights so far comes to: [Note: Kept]."""
        kept = [self._wire.kept[i] for i in members if i in self._wire.kept]
        if any(each.is_cut_short for each in kept):
            return f"lost in an interruption of rank {dist.get_rank()}"
        return _digest([each.state for each in kept])

    def of_forward(self, first: Plan, members: Sequence[int], grad_mode: str) -> dict[str, object]:
        """What the gathers of ``members`` in a forward pass depend on, except the step."""
        return {
            "the first group": first.name,
            "gradients": grad_mode,
            **self.of_payloads(members),
            **self._settings(members, is_forward=True),
            "due before it": self._adaptation.due or "nothing",
        }

    def of_backward(self, members: Sequence[int]) -> dict[str, object]:
        """What the collectives of ``members`` in a backward pass depend on."""
        step = {"step": self._wire.clock.step}
        return {**step, **self.of_payloads(members), **self._settings(members, is_forward=False)}

    def of_average(self) -> dict[str, object]:
        """What the average over the replicas depends on."""
        facts = self.of_backward(range(len(self._plans)))
        own = ("step", "bits and levels", "the seed", "masks") if self._averages else ()
        # Frames are of each shard group's own number: a replica may have validated alone.
        if begun := [each.begun for each in self._wire.kept.values()]:
            facts[KEPT_CODES], own = _digest(begun), (*own, KEPT_CODES, "weights")
        words = (*own, "frozen parameters", "groups that are not reduced")
        return {each: facts[each] for each in (*words, "groups that are not averaged")}

    def _settings(self, members: Sequence[int], *, is_forward: bool) -> dict[str, object]:
        """What FSDP2 was told of ``members`` that decides on the collectives of a pass.

        That is which collectives there are, and in which order.
        """
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
                        self.is_replicated(group) and not group.all_reduces
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


def _digest(states: Sequence[object]) -> str:
    return blake2b(repr(states).encode(), digest_size=4).hexdigest()
