"""The quantized wire of one model: what ``install`` returns."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qsdp.comm.quantization_error import Meter
from qsdp.comm.sparse_support import exchange
from qsdp.common.rank_agreement import meet, mistakes_shared
from qsdp.compat.interrupted_passes import abandon_passes
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.config import QSDPConfig
from qsdp.fsdp.build_parts import BuiltParts
from qsdp.fsdp.grid_tensors import checked_grids, grid_tensors, rows_hash
from qsdp.fsdp.handle_state import check_form
from qsdp.fsdp.report import Report, sharded_rows
from qsdp.fsdp.report_remarks import remarks
from qsdp.fsdp.support_masks import masks_by_place


class Handle:
    """The quantized wire of one model. Made by ``install``.

    ``config`` is what it was installed with, ``traffic`` counts the bytes that this rank sends, and
    ``times`` the seconds of the collectives. Once it was removed, its methods raise RuntimeError.
    """

    def __init__(
        self, config: QSDPConfig, groups: Sequence[ParameterGroup], parts: BuiltParts
    ) -> None:
        self.config = config
        self.traffic = parts.wire.traffic
        self.times = parts.wire.times
        self._groups, self._plans = groups, parts.plans
        self._wire, self._adaptation = parts.wire, parts.adaptation
        self._passes, self._comms = parts.passes, parts.comms
        self._splits, self._stages, self._unsharded = parts.splits, parts.stages, parts.unsharded
        self._everyone = parts.everyone
        # Passes meet in shard groups alone: a rank that is not in one is first heard of there.
        shard_groups = {plan.group for plan in self._plans}
        self._meets = sorted(self._everyone, key=lambda group: group not in shard_groups)
        self._num_shard_groups = sum(group in shard_groups for group in self._everyone)
        is_kept = config.gather == "delta"
        self._kept = [*zip(self._plans, groups, strict=True)] if is_kept else []
        """The groups whose codes are kept."""
        self._grad_meter: Meter | None = None
        self._num_supports = 0
        self._is_removed = False

    def report(self) -> Report:
        """How every parameter travels, at what bits, and why."""
        self._check_installed()
        rows = {**self._unsharded, **sharded_rows(self._plans, self._groups)}
        found = remarks(
            self.config,
            self._plans,
            self._groups,
            self._splits,
            is_allotted=self._adaptation.is_allotted,
        )
        return Report(tuple(rows[index] for index in sorted(rows)), tuple(found))

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, gathers bring the exact weights: for validation without quantization error.

        Gathered weights are dropped on entry and on exit, so that neither layout sees the other's.
        """
        self._check_installed()
        with self._passes.with_weights("is_exact"):
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, weights may be other ones for a while: compressed, or averaged, to evaluate them.

        With ``gather="delta"`` they travel whole meanwhile, as with ``"once"``, and the codes and
        grids that all ranks keep stay those of the weights outside, which are to be back at the
        end. With other gathers it drops gathered weights on entry and on exit, as ``exact`` does.
        ``qsdp.compressed``, and the second pass of ``CrAM`` and ``SAM``, enter it by themselves.

        A backward pass on another side than the last forward pass raises RuntimeError.
        """
        self._check_installed()
        with self._passes.with_weights("is_aside"):
            yield

    def set_support(
        self, masks: Mapping[nn.Parameter, Tensor] | None, *, with_grads: bool = True
    ) -> None:
        """Send only the weights that ``masks`` keep, and their gradients, until the next call.

        A collective where masks are given, one bit a weight: all ranks give them for the same
        parameters. Pruned weights arrive as +0.0 and so do their gradients. The optimizers of
        ``qsdp.methods`` call it where they are told to: ``share_support``.

        Args:
            masks: By parameter (this rank's DTensor) a bool mask of its local shape, True where a
                weight is kept; all others must be +0.0, which every gather checks. Parameters
                without a mask travel whole. None: all do.
            with_grads: False sends all gradients.

        Raises:
            ValueError: A mask is no bool tensor of its parameter's local shape, or is given for
                what FSDP2 does not shard; or ``with_grads`` is False without masks.
            RuntimeError: Ranks give masks for other parameters; or the handle was removed.
        """
        self._check_installed()
        call = "handle.set_support"
        with mistakes_shared(call, self._meets):
            if not masks and not with_grads:
                raise ValueError("with_grads is False without masks: give masks, or leave it out.")
        self._passes.reshard()
        if not masks:
            self._wire.support = 0
            exchange(self._plans, [{}] * len(self._plans), self._wire, with_grads=with_grads)
            return
        with mistakes_shared(call, self._meets):
            chosen = masks_by_place(masks, self._groups)
            facts = {
                "masks of": tuple(
                    plan.names[place]
                    for plan, own in zip(self._plans, chosen, strict=True)
                    for place in sorted(own)
                ),
                "with_grads": bool(with_grads),
            }
        self._meet(call, facts)
        self._num_supports += 1
        self._wire.support = self._num_supports
        exchange(self._plans, chosen, self._wire, with_grads=with_grads)

    @property
    def kept_bytes(self) -> int:
        """Bytes that kept payloads (``gather="once"``) or codes (``"delta"``) take on this rank."""
        self._check_installed()
        return sum(gather.num_bytes for gather in self._comms.gathers)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, the errors of all gradients that this rank sends are measured, for ``errors``.

        It takes about as long again as the codec does. One inside another measures for both.
        """
        self._check_installed()
        meter = self._grad_meter = Meter(self.config, self._wire.level_values)
        self._wire.meters.append(meter)
        try:
            yield
        finally:
            self._wire.meters.remove(meter)
            self._grad_meter = meter

    def errors(self) -> dict[str, dict[str, float | None]]:
        """Relative errors of quantization by parameter name: {"weight": e, "grad": e}.

        Each is |decoded - value| / |value| in the 2-norm over all ranks. A collective.

        Weights are those of now, the values that a gather for training now would send (under
        ``set_support`` the kept ones), at the bits and levels that it would: what is due before it
        is done for the measure alone, and training goes on as if it had not been. Gradients are
        those sent so far inside the ``measuring`` that was entered or left last. None where nothing
        was sent, or not in codes: inside ``exact``, with one rank, at 16 and 32 bits.
        """
        self._check_installed()
        self._passes.settle_what_was_cut_short()
        facts = {
            **self._passes.facts.of_step(),
            **self._passes.facts.of_payloads(range(len(self._plans))),
            "measured gradients": self._grad_meter is not None,
        }
        self._meet("handle.errors", facts)
        weights = Meter(self.config, self._wire.level_values)
        meter = weights if self._grad_meter is None else self._grad_meter
        with self._adaptation.settled():
            self._adaptation.measure_as_sent(weights)
            for gather in self._comms.gathers:
                gather.measure_codes(weights)
        names = {p.index: p.name for plan in self._plans for p in plan.parameters}
        both = (
            source.relative([*names], self._everyone, is_grad=is_grad)
            for source, is_grad in ((weights, False), (meter, True))
        )
        rows = zip(names.values(), *both, strict=True)
        return {name: {"weight": weight, "grad": grad} for name, weight, grad in rows}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to send the same bytes, in JSON's types.

        With a budget or learned levels it is a collective: what is due before the next step is
        done now. Of a backward pass that was cut short it waits for what is under way.
        """
        self._check_installed()
        self._settle("handle.state_dict")
        state = self._wire.clock.state_dict() | self._adaptation.state_dict()
        return state | {"grids": rows_hash(self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, on any number of ranks, each with the same state.

        Allotted bits are taken over if budget, bits, buckets, policy and rotation are the same;
        otherwise the config's own hold, and a budget is allotted by the errors of the next step.
        Levels are taken over if they are learned here, of gradients with the same rotation alone.

        With ``gather="delta"`` all weights are drawn anew by the next gather, unless ``load_grids``
        is called before it.

        Raises ValueError, and loads nothing, if the state is not such as ``state_dict`` gives, or
        if there are bits or levels to take over and the state is of a model whose parameters have
        other names or shapes: a head was replaced, say. With empty "bits" and "levels" such a state
        is loaded, and both are found anew.
        """
        self._check_installed()
        check_form(state, self.config)
        self._adaptation.check_state(state)
        self._passes.mend()
        self._passes.begin_anew()
        self._passes.caches.forget_codes()
        self._wire.clock.load_state_dict(state)
        self._adaptation.load_state_dict(state)

    def grids(self) -> dict[str, Tensor]:
        """The grids of ``gather="delta"``, for a checkpoint: with them a run goes on bit for bit.

        By the name of each coded parameter that several ranks share: "NAME.min" and "NAME.scale",
        fp32, and "NAME.epoch", int32, of each bucket. They are DTensors of one dimension, cut as
        the parameter is, and copies; NaN, 0 and 0 where the next gather draws anew. An empty dict
        with other gathers. Like ``state_dict`` it may be a collective.
        """
        self._check_installed()
        self._settle("handle.grids")
        self._adaptation.settle()
        return grid_tensors(self._kept, [each.own_grids() for each in self._comms.gathers])

    def load_grids(self, grids: Mapping[str, Tensor]) -> None:
        """Go on with the ``grids`` of as many ranks, after ``load_state_dict``: a collective.

        Weights, optimizer and support are as they will be. Whether the grids are of the same bits,
        buckets, roundings and masked parameters, ``state_dict()["grids"]`` says. The next gather
        sends all codes on them. Without any, an empty dict, all are drawn anew.

        Raises ValueError, on all ranks, for names, shapes or dtypes that are not those of ``grids``
        here, so for any with another gather, and for grids that are later than the state.
        """
        self._check_installed()
        call = "handle.load_grids"
        with mistakes_shared(call, self._meets):
            own = checked_grids(grids, self._kept, self._wire.clock.next_step)
        self._meet(call, {"grids": tuple(grids), **self._passes.facts.of_step()})
        self._passes.reshard()
        for gather, its_own in zip(self._comms.gathers, own, strict=False):
            gather.restore_codes(its_own)

    def abandon_step(self) -> None:
        """Give up a step between two of its passes.

        Gradients that were accumulated, and not reduced, are dropped, as ``reset_iter_state`` of
        torch 2.13 says it does; so are sums that wait for their average over replicas.

        An exception inside a pass is noticed without this, at the next pass. A collective, except
        where an exception is being handled: the other ranks may not get here.
        """
        self._check_installed()
        if sys.exc_info()[1] is None:
            self._meet("handle.abandon_step", {})
        for group in self._groups:
            abandon_passes(group.modules[0])
        self._passes.reshard()

    def remove(self) -> None:
        """Give FSDP2 back the collectives it had before ``install``.

        A collective, except where an exception is on its way: the other ranks may not get here.
        """
        self._check_installed()
        if sys.exc_info()[1] is None:
            put_off = [
                plan.name
                for plan, group in zip(self._plans, self._groups, strict=True)
                if self._passes.replicas is not None and group.partial_reduce_output is not None
            ]
            self._meet("handle.remove", {"sums that wait for an average": tuple(put_off)})
            if put_off:
                raise RuntimeError(
                    f"sums of gradients of the group of {put_off[0]} wait for their average over "
                    "replicate_mesh, which set_requires_all_reduce(False) puts off: take a "
                    "backward pass that averages first, or call handle.abandon_step()."
                )
        self._is_removed = True
        self._passes.caches.settle()
        self._passes.remove()
        self._comms.remove()
        self._passes.reshard()
        for stage in self._stages:
            stage.close()

    def _meet(self, call: str, facts: Mapping[str, object]) -> None:
        """Make sure that all ranks are at ``call``.

        The replicas of those that are not hear of it in their passes.
        """
        own, others = self._meets[: self._num_shard_groups], self._meets[self._num_shard_groups :]
        with self._passes.meetings.mistakes_reach_replicas():
            meet(call, facts, own)
        meet(call, facts, others)

    def _settle(self, call: str) -> None:
        """End what was cut short, and meet at ``call`` where what is due is about to be done."""
        self._passes.settle_what_was_cut_short()
        if self.config.has_budget or self.config.levels == "learned":
            self._meet(call, self._passes.facts.of_step())

    def _check_installed(self) -> None:
        if self._is_removed:
            raise RuntimeError("this handle was removed already: call qsdp.install again.")
