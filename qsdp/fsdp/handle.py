"""The quantized wire of one model: what `install` returns."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from qsdp import compat
from qsdp.comm.bit_budget import check_budget
from qsdp.comm.level_fitting import Levels
from qsdp.comm.quantization_error import Meter
from qsdp.comm.support import exchange
from qsdp.comm.topology import launched_ranks
from qsdp.comm.traffic import Traffic
from qsdp.comm.wire_state import Wire
from qsdp.common.meeting import meet, mistakes_shared
from qsdp.common.model_structure import embedding_names, tied_names
from qsdp.config import QSDPConfig
from qsdp.fsdp import agreement
from qsdp.fsdp.adapt import Adaptation
from qsdp.fsdp.handle_state import check_form
from qsdp.fsdp.hooks import AllGather, GradRecorder, ReduceScatter
from qsdp.fsdp.passes import Passes
from qsdp.fsdp.planning import (
    check_type,
    make_hops,
    make_plan,
    make_topology,
    refuse_own_comms,
    replica_group,
    split_into_nodes,
)
from qsdp.fsdp.report import Report, Row
from qsdp.ops import native


class Handle:
    """The quantized wire of one model. Made by `install`."""

    def __init__(
        self,
        model: nn.Module,
        config: QSDPConfig,
        groups: list[compat.ParameterGroup],
        replicate_mesh: DeviceMesh | None,
        node_mesh: DeviceMesh | None,
    ) -> None:
        self.config = config
        self._groups = groups
        self._device = torch.device(groups[0].mesh.device_type)
        self._is_removed = False
        self._averages = replicate_mesh is not None
        _reshard(groups)
        names = {p: name for name, p in compat.named_parameters(model).items()}
        order = {name: i for i, name in enumerate(names.values())}
        meshes = dict.fromkeys(group.mesh for group in groups)
        everyone = [axis for mesh in meshes for axis in mesh.get_all_groups()]
        # Before anything of replicate_mesh is used, which another rank may lack.
        with mistakes_shared(agreement.CALL, everyone):
            replicas = replica_group(groups, replicate_mesh)
            check_type("node_mesh", node_mesh, DeviceMesh | None)
            given = agreement.describe_meshes(replicate_mesh=replicate_mesh, node_mesh=node_mesh)
        agreement.check(everyone, given)
        everyone += [] if replicas is None else [replicas]
        with mistakes_shared(agreement.CALL, everyone):
            here = launched_ranks()
        launched = agreement.by_rank(everyone, here)
        with mistakes_shared(agreement.CALL, everyone):
            check_type("config", config, QSDPConfig)
            native.serving(self._device)  # raises where it is not as required
            if any(isinstance(group.comms()[0], AllGather) for group in groups):
                raise ValueError(
                    f"qsdp is installed on this {type(model).__name__} already; call "
                    "handle.remove() first"
                )
            refuse_own_comms(groups, replicas)
            tied, tables = tied_names(model), embedding_names(model)
            clean = compat.clean_names(model, {*tied, *tied.values(), *tables})
            aliases = {clean[alias]: clean[name] for alias, name in tied.items()}
            config.check_policy(list(order), aliases)
            embeddings = {clean[name] for name in tables}
            config.check_embeddings(embeddings)
            self._plans = [
                make_plan(group, index, names, order, embeddings, config)
                for index, group in enumerate(groups)
            ]
            weights, grads = (
                [claim for plan in self._plans for _, claim in plan.claims(is_grad=is_grad)]
                for is_grad in (False, True)
            )
            check_budget(weights, grads, config)
            if (
                node_mesh is not None
                and config.ranks_per_node is not None
                and node_mesh.size() == dist.get_world_size()
            ):
                raise ValueError(
                    f"ranks_per_node is {config.ranks_per_node} and a node_mesh is given, which "
                    "holds all ranks and says how they split; leave one of the two out"
                )
            topology = make_topology(self._plans, launched, config, node_mesh)
            nodes = split_into_nodes(self._plans, topology, config, node_mesh)
        planned = {p.name for plan in self._plans for p in plan.parameters}
        self._outside = {
            order[name]: Row(name, tuple(p.shape), None, "none", "none", "not sharded by FSDP2")
            for p, name in names.items()
            if name not in planned
        }
        agreement.check(everyone, agreement.describe(config, groups, self._plans))
        self.traffic = Traffic(topology)
        self._wire = Wire(config, self.traffic)
        self.times = self._wire.times
        self._nodes = nodes
        self._hops = make_hops(self._plans, nodes, node_mesh)
        self._everyone = everyone
        # Passes meet in shard groups alone: a rank that is not in one is first heard of there.
        shard_groups = {plan.group for plan in self._plans}
        self._meets = sorted(everyone, key=lambda group: group not in shard_groups)
        self._num_shard_groups = sum(group in shard_groups for group in everyone)
        if config.levels == "learned":
            self._wire.levels = Levels(order)
        self._adaptation = Adaptation(self._plans, groups, self._wire, everyone)
        self._passes = Passes(self._plans, groups, self._wire, self._adaptation, replicas)
        self._grad_meter: Meter | None = None
        self._num_supports = 0
        self._before = [group.comms() for group in groups]
        self._recorders = [
            GradRecorder(plan, group) for plan, group in zip(self._plans, groups, strict=True)
        ]
        self._gathers: list[AllGather] = []
        self._passes.caches = self._gathers
        unwatched: set[GradRecorder] = set()
        for plan, group, recorder in zip(self._plans, groups, self._recorders, strict=True):
            gather = AllGather(plan, self._wire, group, recorder, unwatched, self._passes)
            reduce = ReduceScatter(plan, self._wire, group, recorder, self._passes, replicas)
            self._gathers.append(gather)
            hook = None if replicas is None else reduce.all_reduce
            *_, all_reduce_hook, async_op = group.comms()
            async_op |= group.mesh.device_type == "cpu"
            group.set_comms(gather, reduce, True, hook or all_reduce_hook, async_op)
        self._passes.comms = [group.comms() for group in groups]

    def report(self) -> Report:
        """How every parameter travels, at what bits, and why."""
        self._check_installed()
        rows = dict(self._outside)
        for plan, group in zip(self._plans, self._groups, strict=True):
            for p, is_trained in zip(plan.parameters, group.requires_grad(), strict=True):
                weight = _travel(p.weight_bits, p.dtype)
                grad = _travel(p.grad_bits, group.reduce_dtype or p.dtype, is_grad=True)
                why = p.why if is_trained else f"{p.why}, frozen"
                row = Row(p.name, tuple(p.shape), plan.index, weight, grad, why)
                rows[p.index] = row if is_trained else replace(row, grad="none")
        return Report(tuple(rows[index] for index in sorted(rows)), tuple(self._remarks()))

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, gathers bring the exact weights: for validation without quantization error.

        Gathered weights are dropped on entry and on exit, so that neither layout sees the other's.
        """
        self._check_installed()
        self._reshard()
        before, self._wire.is_exact = self._wire.is_exact, True
        try:
            yield
        finally:
            self._reshard()
            self._wire.is_exact = before

    def set_support(
        self, masks: Mapping[nn.Parameter, Tensor] | None, *, with_grads: bool = True
    ) -> None:
        """Send only the weights that ``masks`` keep, and their gradients, until the next call.

        A collective where masks are given, one bit a weight: all ranks give them for the same
        parameters. Pruned weights arrive as +0.0 and so do their gradients.
        The optimizers of `qsdp.methods` call it where they are told to: `share_support`.

        Args:
            masks: by parameter (this rank's DTensor) a bool mask of its local shape, True where a
                weight is kept; all others must be +0.0, which every gather checks. Parameters
                without a mask travel whole. None: all do.
            with_grads: False sends all gradients.

        Raises:
            ValueError: if a mask is no bool tensor of its parameter's local shape, or is given for
                what FSDP2 does not shard; or `with_grads` is False without masks.
            RuntimeError: if ranks give masks for other parameters; or the handle was removed.
        """
        self._check_installed()
        call = "handle.set_support"
        with mistakes_shared(call, self._meets):
            if not masks and not with_grads:
                raise ValueError("with_grads is False without masks; give masks, or leave it out")
        self._reshard()
        if not masks:
            self._wire.support = 0
            exchange(self._plans, [{}] * len(self._plans), self._wire, with_grads=with_grads)
            return
        with mistakes_shared(call, self._meets):
            chosen = self._masks_by_place(masks)
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
        """What kept payloads (`gather="once"`) take at most on this rank, in bytes."""
        self._check_installed()
        return sum(gather.kept_bytes for gather in self._gathers)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, the errors of all gradients that this rank sends are measured, for `errors`.

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
        """Relative errors of quantization by parameter name: {"weight": e, "grad": e}, each
        |decoded - value| / |value| in the 2-norm over all ranks. A collective.

        Weights are those of now, the values that a gather for training now would send (under
        `set_support` the kept ones), at the bits and levels that it would: what is due before it
        is done for the measure alone, and training goes on as if it had not been. Gradients are
        those sent so far inside the `measuring` that was entered or left last. None where nothing
        was sent, or not in codes: inside `exact`, with one rank, at 16 and 32 bits.
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
        parameters = [p for plan in self._plans for p in plan.parameters]
        columns = {
            name: [_relative(*pair) for pair in source.totals(keys, self._everyone).tolist()]
            for name, source, is_grad in (("weight", weights, False), ("grad", meter, True))
            for keys in [[(p.index, is_grad, 0) for p in parameters]]
        }
        return {
            p.name: {name: column[i] for name, column in columns.items()}
            for i, p in enumerate(parameters)
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to send the same bytes, in JSON's types.

        With a `budget` or learned levels it is a collective: what is due before the next step is
        done now. Of a backward pass that was cut short it waits for what is under way.
        """
        self._check_installed()
        self._passes.settle_what_was_cut_short()
        if self.config.budget is not None or self.config.levels == "learned":
            self._meet("handle.state_dict", self._passes.facts.of_step())
        return self._wire.clock.state_dict() | self._adaptation.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any number of ranks, each with the same state.

        Allotted bits are taken over if budget, bits, bucket size and policy are those of then;
        otherwise the config's own hold, and a budget is allotted by the errors of the next step.
        Levels are taken over if they are learned here.

        Raises ValueError, and loads nothing, if the state is not such as `state_dict` gives, or if
        there are bits or levels to take over and the state is of a model whose parameters have
        other names or shapes: a head was replaced, say. With empty "bits" and "levels" such a state
        is loaded, and both are found anew.
        """
        self._check_installed()
        check_form(state)
        self._adaptation.check_state(state)
        self._passes.mend()
        self._passes.begin_anew()
        self._wire.clock.load_state_dict(state)
        self._adaptation.load_state_dict(state)

    def abandon_step(self) -> None:
        """Give up a step between two of its passes: gradients that were accumulated, and not
        reduced, are dropped, as `reset_iter_state` of torch 2.13 says it does; so are sums that
        wait for their average over replicas.

        An exception inside a pass is noticed without this, at the next pass. A collective, but
        where an exception is being handled: the other ranks may not get here.
        """
        self._check_installed()
        if sys.exc_info()[1] is None:
            self._meet("handle.abandon_step", {})
        for group in self._groups:
            compat.abandon_pass(group.modules[0])
        self._reshard()

    def remove(self) -> None:
        """Give FSDP2 back the collectives it had before `install`. A collective, but where an
        exception is on its way: the other ranks may not get here."""
        self._check_installed()
        if sys.exc_info()[1] is None:
            put_off = [
                plan.name
                for plan, group in zip(self._plans, self._groups, strict=True)
                if self._averages and group.put_off is not None
            ]
            self._meet("handle.remove", {"sums that wait for an average": tuple(put_off)})
            if put_off:
                raise RuntimeError(
                    f"sums of gradients of the group of {put_off[0]} wait for their average over "
                    "replicate_mesh, which set_requires_all_reduce(False) puts off: take a "
                    "backward pass that averages first, or call handle.abandon_step()"
                )
        self._is_removed = True
        self._passes.remove()
        for recorder in self._recorders:
            recorder.remove()
        pairs = zip(self._before, self._passes.comms, strict=True)
        for group, (before, installed) in zip(self._groups, pairs, strict=True):
            # What the user has set since stays.
            gather, reduce, force_sum, hook, async_op = (
                was if now is own else now
                for was, own, now in zip(before, installed, group.comms(), strict=True)
            )
            group.set_comms(gather, reduce, force_sum, hook, async_op)
        self._reshard()
        for hops in self._hops.values():
            hops.close()

    def _meet(self, call: str, facts: Mapping[str, object]) -> None:
        """Make sure that all ranks are at ``call``, or that the replicas of those that are not hear
        of it in their passes."""
        own, others = self._meets[: self._num_shard_groups], self._meets[self._num_shard_groups :]
        with self._passes.meetings.mistakes_reach_replicas():
            meet(call, facts, own)
        meet(call, facts, others)

    def _check_installed(self) -> None:
        if self._is_removed:
            raise RuntimeError("this handle was removed already; call qsdp.install again")

    def _reshard(self) -> None:
        """Make the next pass gather everything anew: what gathers bring is about to change."""
        self._passes.mend()
        self._passes.begin_anew()
        _reshard(self._groups)

    def _masks_by_place(self, masks: Mapping[nn.Parameter, Tensor]) -> list[dict[int, Tensor]]:
        """By plan and place the masks that `set_support` is given."""
        for parameter, mask in masks.items():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if type(mask) is not torch.Tensor or mask.dtype != torch.bool:
                raise ValueError(
                    f"a mask is a {type(mask).__name__} of {getattr(mask, 'dtype', None)}; give a "
                    "bool tensor of the parameter's local shape (of a DTensor: mask.to_local())"
                )
            if mask.shape != local.shape:
                raise ValueError(
                    f"a mask has shape {tuple(mask.shape)}, and the local part of its parameter "
                    f"{tuple(local.shape)}; give a mask of that shape"
                )
        left = {id(parameter): (parameter, mask) for parameter, mask in masks.items()}
        chosen = [
            {
                place: left.pop(id(sharded.parameter))[1]
                for place, sharded in enumerate(group.parameters() if left else [])
                if id(sharded.parameter) in left
            }
            for group in self._groups
        ]
        for parameter, _ in left.values():
            raise ValueError(
                f"a mask is given for a tensor of shape {tuple(parameter.shape)} that FSDP2 does "
                "not shard in this model; give masks by the model's own parameters"
            )
        return chosen

    def _masked(self) -> list[tuple[int, int]]:
        """Kept and all values of each parameter of which only the kept ones are sent."""
        once = self.config.gather == "once"
        return [
            (num, plan.parameters[place].shape.numel())
            for plan, group in zip(self._plans, self._groups, strict=True)
            for place, num in plan.num_kept.items()
            if group.requires_grad()[place] or not once
        ]

    def _remarks(self) -> Iterator[str]:
        yield native.remark(self._device)
        config = self.config
        if config.rounding == "nearest":
            yield "rounding to nearest is biased: weights and gradients keep a systematic error"
        sizes = {plan.world_size for plan in self._plans}
        if sizes == {1}:
            yield "one rank: FSDP2 bypasses the collectives, weights and gradients are exact"
        if any(group.replicas > 1 for group in self._groups):
            whose = "FSDP2's own, in full precision and not counted"
            yield f"HSDP: the all-reduce between replicas is {whose}"
        if any(group.regather_world_size for group in self._groups):
            yield "reshard_after_forward=<int>: second gathers carry decoded weights, raw"
        if config.gather == "once":
            kept = "payloads of modules in training mode are kept"
            yield f"gather once: {kept} from the forward to the backward pass"
            frozen = sum(not each for group in self._groups for each in group.requires_grad())
            if frozen:
                how = "whole, on the uniform grid, without a warm-up"
                yield f"gather once: {frozen} frozen parameters are sent once for all steps, {how}"
        masked = self._masked()
        if masked:
            num_kept, num_all = (sum(column) for column in zip(*masked, strict=True))
            sparse = any(plan.num_kept and plan.has_sparse_grads for plan in self._plans)
            share = f"the kept {num_kept / max(1, num_all):.1%} of the weights"
            grads = "and of the gradients" if sparse else "and all gradients"
            yield f"masks: of {len(masked)} parameters only {share} travel, {grads}"
        for group, nodes in self._nodes.items():
            hops = f"two hops over {len(nodes)} nodes of {len(nodes[0])} ranks"
            local = config.local_grad_bits or 8
            if group in self._hops:
                yield f"{hops}: coded gradients travel at {local} bits inside a node"
            elif config.reduce == "two-hop":
                yield f"{hops} would save nothing: reduces and gathers are flat"
        if config.levels == "learned":
            steps = ", ".join(map(str, config.learning_steps))
            yield f"learned levels for 2 to 6 bits, fitted before steps {steps}"
        if config.warmup_steps:
            least = f"at least {config.least_warmup_bits} bits"
            yield f"warm-up: {least} in the first {config.warmup_steps} steps"
        if config.budget is not None:
            when = "allotted" if self._adaptation.is_allotted else "to be allotted when measured"
            yield f"budget: {config.budget:g} bits a coded value, {when}"


def _reshard(groups: Sequence[compat.ParameterGroup]) -> None:
    for group in groups:
        compat.reshard_module(group.module)


def _relative(error: float, square: float) -> float | None:
    """None where nothing was measured."""
    return (error / square) ** 0.5 if square else None


def _travel(bits: int, dtype: torch.dtype, *, is_grad: bool = False) -> str:
    if bits <= 8:
        return f"{bits} bits"
    if bits == 16 and dtype == torch.float32:
        return "bfloat16"
    return "raw" if is_grad else f"raw {dtype}".replace("torch.", "")
