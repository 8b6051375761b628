"""What changes while training: bits that follow a budget, levels that are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from reprlib import repr as shown
from typing import Any

import torch
import torch.distributed as dist

from qsdp.comm.bit_budget import allot, budget_request
from qsdp.comm.group_plan import Plan
from qsdp.comm.learned_levels import LevelCounts, LevelKind, check_level_rows, levels_offset
from qsdp.comm.quantization_error import Meter
from qsdp.comm.wire_state import Wire
from qsdp.common.user_errors import counted
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.config import CODED_BITS


class Adaptation:
    """Sets the bits and levels of all plans between two steps, alike on all ranks.

    ``mark`` is a short text that is the same for the same bits and levels.

    Args:
        plans, groups: Those of the handle.
        wire: With the config and the step.
        everyone: Process groups that together reach all ranks, one after the other.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        groups: Sequence[ParameterGroup],
        wire: Wire,
        everyone: Sequence[dist.ProcessGroup],
    ) -> None:
        self._plans, self._groups, self._wire, self._everyone = plans, groups, wire, everyone
        self._settled = -1
        self._request = budget_request(wire.config)
        self._bits: dict[str, tuple[int, int]] = {}
        self._meter: Meter | None = None
        self._counts: LevelCounts | None = None
        self._mark()

    def settle(self) -> None:
        """Do what is due before the step of a gather that came now; if so, it is a collective."""
        step = self._wire.clock.next_step
        if step > self._settled:
            with torch.inference_mode(False):  # what is made now is written in training
                self._settle(step)

    def _settle(self, step: int) -> None:
        self._settled = step
        learns = self._wire.levels is not None and step in self._wire.config.learning_steps
        meter, counts = self._take_meters()
        if meter is not None:
            self._allot(meter)
        levels = self._wire.levels
        if levels is not None and learns:
            counts = counts or self._new_counts()
            self._look(counts)
            levels.learn(counts, self._everyone, self._wire.traffic)
            self._mark()
        self._watch(step)

    @property
    def due(self) -> str:
        """What ``settle`` would do now with all ranks."""
        step, levels = self._wire.clock.next_step, self._wire.levels
        if step <= self._settled:
            return ""
        due = ["bits"] if self._meter is not None else []
        if levels is not None and step in self._wire.config.learning_steps:
            due.append("levels")
        return " and ".join(due)

    @property
    def is_allotted(self) -> bool:
        """Whether the bits follow the budget by now."""
        return bool(self._bits)

    def watch_again(self) -> None:
        """Forget what was seen of a backward pass that was cut short: the step is taken again."""
        self._take_meters()
        if self._settled >= 0:
            self._watch(self._settled)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, bits and levels are those of a gather for training now; then all is due again.

        A collective when something is due.
        """
        if not self.due or self._wire.is_exact:  # such gathers wait for nothing
            yield
            return
        with torch.inference_mode(False):  # what is copied now is written in training
            rewind = self.rewind_point()
        try:
            self.settle()
            yield
        finally:
            rewind()

    def rewind_point(self) -> Callable[[], None]:
        """A function that restores everything as it is now, between two steps."""
        settled, bits, levels = self._settled, self._bits, self._wire.levels
        rewind_levels = None if levels is None else levels.rewind_point()
        meter = None if self._meter is None else self._meter.copy()
        counts = None if self._counts is None else self._counts.copy()

        def rewind() -> None:
            if bits != self._bits:
                self._set_bits(bits)
            if rewind_levels is not None:
                rewind_levels()
            self._settled = settled
            self._mark()
            self._take_meters()
            self._meter, self._counts = meter, counts
            self._wire.meters += [each for each in (meter, counts) if each is not None]

        return rewind

    def measure_as_sent(self, meter: Meter) -> None:
        """Let ``meter`` look at this rank's weights as a gather now would send them."""
        config, step = self._wire.config, self._wire.clock.next_step
        # Kept codes have another measure.
        if not self._wire.is_exact and self._wire.gathers(step) != "delta":
            self._look(meter, config.least_warmup_bits if step < config.warmup_steps else 0)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, in JSON's types."""
        self.settle()
        bits = {name: list(both) for name, both in self._bits.items()}
        levels = [] if self._wire.levels is None else self._wire.levels.state()
        parameters = self._shapes() if bits or levels else {}
        return {"request": self._request, "parameters": parameters, "bits": bits, "levels": levels}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless what ``load_state_dict`` would take is of these parameters."""
        bits, levels = self._to_take_over(state)
        if not bits and not levels:
            return
        ours = self._shapes()
        advice = (
            "load it into the model that it was taken from, or give it with empty "
            '"bits" and "levels", to find both anew'
        )
        if "parameters" not in state:
            raise ValueError(
                "the state has bits or levels by the numbers of parameters, as earlier versions of "
                f"qsdp wrote them, and not by their names: {advice}."
            )
        if not isinstance(bits, dict):
            raise ValueError(
                f"the state's bits are {shown(bits)}: give those that state_dict() returned."
            )
        check_level_rows(levels)
        named = [*bits, *(row[0] for row in levels)]
        theirs = dict.fromkeys(named, "unknown") | state["parameters"]
        differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if differing:
            first = differing[0]
            there, here = (each.get(first, "missing") for each in (theirs, ours))
            raise ValueError(
                f"the state is of another model, as {first} is {there} there and {here} here, "
                f"the first of {counted(len(differing), 'difference')}: {advice}."
            )
        allottable = self._allottable() if bits else {}
        odd = sorted(bits.keys() ^ allottable.keys())
        if odd:
            raise ValueError(
                f"the state has {'bits' if odd[0] in bits else 'no bits'} for {odd[0]}, the first "
                f"of {counted(len(odd), 'difference')} to what the budget is allotted to here: "
                f"{advice}."
            )
        for name, allowed in allottable.items():
            both = bits[name]
            if not isinstance(both, list | tuple) or not _are_allowed_bits(both, allowed):
                words = ", ".join("2 to 8" if len(own) > 1 else str(*own) for own in allowed)
                raise ValueError(
                    f"the state's bits of {name} are {shown(both)}: give [{words}], of weights and "
                    "of gradients, as state_dict() returned it."
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over levels, and bits that were allotted to the same request: nothing is due now."""
        self._take_meters()
        self._settled = self._wire.clock.next_step
        bits, levels = self._to_take_over(state)
        self._set_bits({name: (weight, grad) for name, (weight, grad) in bits.items()})
        if self._wire.levels is not None:
            has, grad = self._wire.config.has_levels, LevelKind.GRAD.name.lower()
            # Levels fit what travels, which is another thing where it is rotated.
            mine, its = (each.get("grad_rotation") for each in (self._request, state["request"]))
            taken = (row for row in levels if mine == its or row[1] != grad)
            self._wire.levels.load(row for row in taken if has(row[2], is_grad=row[1] == grad))
        self._mark()
        self._watch(self._settled)

    def _to_take_over(self, state: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """The bits and the rows of levels in ``state`` that are for this config."""
        bits = state["bits"] if state["request"] == self._request else {}
        return bits or {}, [] if self._wire.levels is None else state["levels"]

    def _shapes(self) -> dict[str, Any]:
        """The shapes of all parameters, by name, in JSON's types."""
        return {p.name: list(p.shape) for plan in self._plans for p in plan.parameters}

    def _allottable(self) -> dict[str, list[tuple[int, ...]]]:
        """The bits that weights and gradients of parameters which share the budget may get.

        Of a parameter whose weights or gradients alone share it, the others keep their own.
        """
        found: dict[str, list[tuple[int, ...]]] = {}
        for plan in self._plans:
            for is_grad in (False, True):
                for p, claim in plan.claims(is_grad=is_grad):
                    if claim.kept_bits is None:
                        own = found.setdefault(p.name, [(p.weight_bits,), (p.grad_bits,)])
                        own[is_grad] = CODED_BITS
        return found

    def _mark(self) -> None:
        """Write down in ``mark``, for comparison, what bits and levels are now."""
        levels = self._wire.level_values
        values = b"" if levels is None else levels.numpy().tobytes()
        described = repr(sorted(self._bits.items())).encode() + values
        self.mark = blake2b(described, digest_size=4).hexdigest()

    def _take_meters(self) -> tuple[Meter | None, LevelCounts | None]:
        """What has looked at gradients since the last step, which it now stops doing."""
        taken = self._meter, self._counts
        for meter in taken:
            if meter is not None:
                self._wire.meters.remove(meter)
        self._meter = self._counts = None
        return taken

    def _watch(self, step: int) -> None:
        """Look at the gradients of ``step`` if bits are allotted or levels learned after it."""
        config = self._wire.config
        if config.levels == "learned" and step + 1 in config.learning_steps:
            self._counts = self._new_counts()
            self._wire.meters.append(self._counts)
        if config.has_budget and step >= config.warmup_steps and not self._bits:
            self._meter = Meter(config, self._wire.level_values, CODED_BITS)
            self._wire.meters.append(self._meter)

    def _new_counts(self) -> LevelCounts:
        """Counts for all levels that this step's and later payloads may use."""
        config = self._wire.config
        places = []
        for p in (p for plan in self._plans for p in plan.parameters):
            local = config.local_grad_bits or 8
            used = [(p.weight_bits, LevelKind.WEIGHT), (p.weight_bits, LevelKind.KEPT)]
            used += [(p.grad_bits, LevelKind.GRAD), (local, LevelKind.GRAD)]
            for bits, kind in used:
                start = levels_offset(config, p.index, bits, kind)
                places += [(start, bits)] if start >= 0 else []
        return LevelCounts(places)

    def _look(self, meter: Meter | LevelCounts, least_bits: int = 0) -> None:
        """Let ``meter`` look at what this rank's gathers send, at no fewer than ``least_bits``."""
        once = self._wire.gathers(self._wire.clock.next_step) == "once"
        for plan, group in zip(self._plans, self._groups, strict=True):
            trains, shards, masked = group.requires_grad(), group.local_shards(), plan.num_kept
            for is_frozen in (False, True):
                places = tuple(i for i in plan.places if (once and not trains[i]) == is_frozen)
                if not places or plan.world_size == 1:
                    continue
                least = 0 if is_frozen else least_bits
                layout = plan.gather(places, least, is_frozen=is_frozen)
                for number, row in enumerate(layout.table(plan.rank).tolist()):
                    i = places[number]
                    values = shards[i].detach().to(plan.parameters[i].dtype).reshape(-1)
                    kind = LevelKind.KEPT if i in masked else LevelKind.WEIGHT
                    sent = layout.kept(plan.rank, number, values)
                    meter.add_values(row, sent, LevelKind.FROZEN if is_frozen else kind)

    def _allot(self, meter: Meter) -> None:
        """Set the bits by the errors of the last step; leave them where one is not finite."""
        config = self._wire.config
        if config.budget is not None:
            self._look(meter)
        found: dict[str, list[int]] = {}
        for is_grad in (False, True):
            coded = [pair for plan in self._plans for pair in plan.claims(is_grad=is_grad)]
            chosen = [p for p, claim in coded if claim.kept_bits is None]
            budget = config.budget_of(is_grad=is_grad)
            if budget is None or not chosen:
                continue
            keys = [(p.index, is_grad, b) for p in chosen for b in CODED_BITS]
            errors = meter.totals(keys, self._everyone)[:, 0]
            if not errors.isfinite().all():
                return
            claims, rows = [claim for _, claim in coded], errors.view(len(chosen), -1).tolist()
            bits = allot(claims, rows, budget, config, is_grad=is_grad)
            for p, b in zip(chosen, bits, strict=True):
                found.setdefault(p.name, [p.weight_bits, p.grad_bits])[is_grad] = b
        self._set_bits({name: (weight, grad) for name, (weight, grad) in found.items()})

    def _set_bits(self, bits: dict[str, tuple[int, int]]) -> None:
        self._bits = bits
        self._mark()
        for plan in self._plans:
            plan.set_bits(bits)


def _are_allowed_bits(both: Sequence[Any], allowed: Sequence[tuple[int, ...]]) -> bool:
    return len(both) == len(allowed) and all(
        type(bits) is int and bits in own for bits, own in zip(both, allowed, strict=True)
    )
