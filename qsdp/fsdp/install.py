"""`install(model, config) -> handle`: the quantized wire on a model that the user sharded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from qsdp import compat
from qsdp.comm.levels import Levels
from qsdp.comm.measure import Meter, check_budget
from qsdp.comm.plan import DTYPES, Parameter, Plan, embedding_names, tied_names
from qsdp.comm.support import exchange
from qsdp.comm.topology import (
    Hops,
    Topology,
    check_mesh,
    is_worth_two_hops,
    launched_ranks,
    nodes_of,
    split,
)
from qsdp.comm.traffic import Traffic
from qsdp.comm.wire import Wire
from qsdp.config import QSDPConfig
from qsdp.fsdp import agreement
from qsdp.fsdp.adapt import Adaptation
from qsdp.fsdp.hooks import AllGather, GradRecorder, ReduceScatter
from qsdp.fsdp.report import Report, Row


def install(
    model: nn.Module,
    config: QSDPConfig | None = None,
    *,
    replicate_mesh: DeviceMesh | None = None,
    node_mesh: DeviceMesh | None = None,
) -> "Handle":
    """Send the weights and gradients of ``model`` over the wire as ``config`` says.

    A collective: all ranks of the model's mesh call it, and make sure that they agree.

    Args:
        model: a module on which `fully_shard` was called, itself or on submodules. Its parameters
            stay plain DTensors; optimizers, checkpoints and clipping work as before.
        config: bits, buckets, rounding; None takes the defaults (8 bits both ways).
        replicate_mesh: HSDP with a quantized all-reduce: a 1-D mesh over the ranks that hold the
            same shards, of a model that was sharded over a 1-D mesh of its own.
        node_mesh: a 2-D mesh [nodes, ranks of a node] over the shard group's ranks, in place of
            `ranks_per_node`, also for the counters of bytes.

    Returns:
        A `Handle`: report, traffic counters, state for checkpoints, removal.

    Raises:
        ValueError: the model is not sharded by FSDP2, has the wire already, or uses what qsdp does
            not support: CPUOffloadPolicy, per-parameter meshes, tensor parallelism, a mesh without
            a shard axis, float64 in parameters or reduces, parameters with an all-gather of their
            own; a policy pattern matches no parameter; the budget is less than 2 bits and their
            metadata take, or has nothing to allot; the shard group does not split into nodes
            as a two-hop reduce needs; or replicate_mesh is not such a mesh.
        RuntimeError: the ranks do not have the same model, config and meshes.
    """
    groups = compat.parameter_groups(model)
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no FSDP2 parameters; call fully_shard before qsdp.install"
        )
    config = QSDPConfig() if config is None else config
    return Handle(model, config, groups, replicate_mesh, node_mesh)


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
        self._is_removed = False
        self._reshard()
        names = {p: compat.name_without_wrappers(name) for name, p in model.named_parameters()}
        order = {name: i for i, name in enumerate(names.values())}
        meshes = dict.fromkeys(group.mesh for group in groups)
        everyone = [axis for mesh in meshes for axis in mesh.get_all_groups()]
        # Before anything of replicate_mesh is used, which another rank may lack.
        with agreement.mistakes_shared(everyone):
            replicas = _replica_group(groups, replicate_mesh)
            _check_type("node_mesh", node_mesh, DeviceMesh | None)
            given = agreement.describe_meshes(replicate_mesh=replicate_mesh, node_mesh=node_mesh)
        agreement.check(everyone, given)
        everyone += [] if replicas is None else [replicas]
        launched = agreement.by_rank(everyone, launched_ranks())
        with agreement.mistakes_shared(everyone):
            _check_type("config", config, QSDPConfig)
            if any(isinstance(group.comms()[0], AllGather) for group in groups):
                raise ValueError(
                    f"qsdp is installed on this {type(model).__name__} already; call "
                    "handle.remove() first"
                )
            clean = compat.name_without_wrappers
            aliases = {clean(alias): clean(name) for alias, name in tied_names(model).items()}
            config.check_policy(list(order), aliases)
            embeddings = set(map(clean, embedding_names(model)))
            self._plans = [
                _make_plan(group, index, names, order, embeddings, config)
                for index, group in enumerate(groups)
            ]
            weights, grads = (
                [claim for plan in self._plans for _, claim in plan.claims(is_grad=is_grad)]
                for is_grad in (False, True)
            )
            check_budget(weights, grads, config)
            topology = _make_topology(self._plans, launched, config, node_mesh)
            nodes = _split_into_nodes(self._plans, topology, config, node_mesh)
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
        self._hops = _make_hops(self._plans, nodes, node_mesh)
        self._owns_hops = node_mesh is None
        self._everyone = everyone
        if config.levels == "learned":
            self._wire.levels = Levels(len(order))
        self._adaptation = Adaptation(self._plans, groups, self._wire, everyone)
        self._grad_meter: Meter | None = None
        self._before = [group.comms() for group in groups]
        self._recorders = [
            GradRecorder(plan, group) for plan, group in zip(self._plans, groups, strict=True)
        ]
        self._gathers = []
        for plan, group, recorder in zip(self._plans, groups, self._recorders, strict=True):
            gather = AllGather(plan, self._wire, group, self._recorders, self._adaptation.settle)
            reduce = ReduceScatter(plan, self._wire, recorder, replicas)
            self._gathers.append(gather)
            hook = None if replicas is None else reduce.all_reduce
            *_, all_reduce_hook, async_op = group.comms()
            async_op |= group.mesh.device_type == "cpu"
            group.set_comms(gather, reduce, True, hook or all_reduce_hook, async_op)

    def report(self) -> Report:
        """How every parameter travels, at what bits, and why."""
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

        Gathered weights are dropped on entry and on exit, so that neither side sees the other's.
        """
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

        A collective, one bit a weight. Pruned weights arrive as +0.0 and so do their gradients.
        The optimizers of `qsdp.optim` call it where they are told to: `share_support`.

        Args:
            masks: by parameter (this rank's DTensor) a bool mask of its local shape, True where a
                weight is kept; all others must be +0.0, which every gather checks. Parameters
                without a mask travel whole. None: all do.
            with_grads: False sends all gradients.
        """
        self._reshard()
        places = [
            {id(parameter.parameter): place for place, parameter in enumerate(group.parameters())}
            for group in self._groups
        ]
        known = {key for each in places for key in each}
        for parameter in masks or {}:
            if id(parameter) not in known:
                raise ValueError(
                    f"a mask is given for a tensor of shape {tuple(parameter.shape)} that FSDP2 "
                    "does not shard in this model; give masks by the model's own parameters"
                )
        by_id = {id(parameter): mask for parameter, mask in (masks or {}).items()}
        chosen = [
            {place: by_id[key] for key, place in each.items() if key in by_id} for each in places
        ]
        exchange(self._plans, chosen, self._wire, with_grads=with_grads)

    @property
    def kept_bytes(self) -> int:
        """What kept payloads (`gather="once"`) take at most on this rank, in bytes."""
        return sum(gather.kept_bytes for gather in self._gathers)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, the errors of all gradients that this rank sends are measured, for `errors`.

        It takes about as long again as the codec does.
        """
        self._grad_meter = Meter(self.config, self._wire.level_values)
        self._wire.meters.append(self._grad_meter)
        try:
            yield
        finally:
            self._wire.meters.remove(self._grad_meter)

    def errors(self) -> dict[str, dict[str, float | None]]:
        """Relative errors of quantization by parameter name: {"weight": e, "grad": e}, each
        |decoded - value| / |value| in the 2-norm over all ranks. A collective.

        Weights are those of now, as a gather now would send them; gradients those reduced inside
        the last `measuring`. None where there were none or they travel raw.
        """
        weights = Meter(self.config, self._wire.level_values)
        meter = weights if self._grad_meter is None else self._grad_meter
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
        done now.
        """
        return self._wire.clock.state_dict() | self._adaptation.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any number of ranks.

        Allotted bits are taken over if budget, bits, bucket size and policy are those of then;
        otherwise the config's own hold, and a budget is allotted by the errors of the next step.
        """
        self._wire.clock.load_state_dict(state)
        self._adaptation.load_state_dict(state)

    def remove(self) -> None:
        """Give FSDP2 back the collectives it had before `install`. A collective after a two-hop
        reduce."""
        if self._is_removed:
            raise RuntimeError("this handle was removed already; call qsdp.install again")
        self._is_removed = True
        for recorder in self._recorders:
            recorder.remove()
        for group, before in zip(self._groups, self._before, strict=True):
            group.set_comms(*before)
        self._reshard()
        if self._owns_hops:
            for hops in self._hops.values():
                hops.close()

    def _reshard(self) -> None:
        for group in self._groups:
            group.module.reshard()

    def _remarks(self) -> Iterator[str]:
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
        for group, nodes in self._nodes.items():
            hops = f"two hops over {len(nodes)} nodes of {len(nodes[0])} ranks"
            local = config.local_grad_bits or 8
            if group in self._hops:
                yield f"{hops}: coded gradients travel at {local} bits inside a node"
            elif config.reduce == "two-hop":
                yield f"{hops} would save nothing: reduces and gathers are flat"
        if config.levels == "learned":
            steps = ", ".join(map(str, config.level_steps))
            yield f"learned levels for 2 to 6 bits, fitted before steps {steps}"
        if config.warmup_steps:
            least = f"at least {config.warmup_bits} bits"
            yield f"warm-up: {least} in the first {config.warmup_steps} steps"
        if config.budget is not None:
            when = "allotted" if self._adaptation.is_allotted else "to be allotted when measured"
            yield f"budget: {config.budget:g} bits a coded value, {when}"


def _replica_group(
    groups: list[compat.ParameterGroup], mesh: DeviceMesh | None
) -> dist.ProcessGroup | None:
    """The process group of ``replicate_mesh``, checked against the model's own mesh."""
    _check_type("replicate_mesh", mesh, DeviceMesh | None)
    if mesh is None:
        return None
    if mesh.ndim != 1:
        raise ValueError(f"replicate_mesh has {mesh.ndim} dimensions; give a 1-D mesh")
    for group in groups:
        if group.mesh_ndim != 1 or group.mesh.size() < 2:
            raise ValueError(
                f"{_name(group)} is sharded over a mesh of shape {tuple(group.mesh.shape)}; "
                "replicate_mesh goes with a 1-D shard mesh of 2 or more ranks"
            )
    shared = set(mesh.mesh.tolist()) & set(groups[0].mesh.mesh.tolist())
    if shared != {dist.get_rank()}:
        raise ValueError(
            f"replicate_mesh holds the ranks {mesh.mesh.tolist()}, which share {sorted(shared)} "
            "with the shard mesh; they must share this rank alone"
        )
    return mesh.get_group()


def _check_type(name: str, given: object, wanted: Any) -> None:
    """Raise ValueError unless ``given`` is a ``wanted``, or None where that may be."""
    if not isinstance(given, wanted):
        allowed = "qsdp.QSDPConfig" if wanted is QSDPConfig else "DeviceMesh"
        raise ValueError(f"{name} is a {type(given).__name__}; give a {allowed}")


def _make_topology(
    plans: list[Plan], launched: Mapping[int, int], config: QSDPConfig, mesh: DeviceMesh | None
) -> Topology:
    """The nodes of all ranks, of which launchers say how many they ``launched``."""
    if mesh is not None:
        for group in {plan.group for plan in plans if plan.world_size > 1}:
            check_mesh(group, mesh)
    size = config.ranks_per_node
    sizes = launched if size is None else dict.fromkeys(range(dist.get_world_size()), size)
    return Topology(sizes, mesh)


def _split_into_nodes(
    plans: list[Plan], topology: Topology, config: QSDPConfig, mesh: DeviceMesh | None
) -> dict[dist.ProcessGroup, list[list[int]]]:
    """The nodes of each process group that may travel in two hops.

    Raises ValueError where the config asks for two hops and there are no even nodes.
    """
    nodes: dict[dist.ProcessGroup, list[list[int]]] = {}
    for group in dict.fromkeys(plan.group for plan in plans if plan.world_size > 1):
        if config.reduce == "flat":
            continue
        try:
            nodes[group] = nodes_of(group, topology) if mesh is None else mesh.mesh.tolist()
        except ValueError:
            if config.reduce == "two-hop":
                raise
    return nodes


def _make_hops(
    plans: list[Plan], nodes: dict[dist.ProcessGroup, list[list[int]]], mesh: DeviceMesh | None
) -> dict[dist.ProcessGroup, Hops]:
    """The hops of each process group whose nodes are worth two of them."""
    hops = {
        group: split(group, own) if mesh is None else Hops(mesh.get_group(1), mesh.get_group(0))
        for group, own in nodes.items()
        if is_worth_two_hops(own)
    }
    for plan in plans:
        plan.hops = hops.get(plan.group)
    return hops


def _relative(error: float, square: float) -> float | None:
    """None where nothing was measured."""
    return (error / square) ** 0.5 if square else None


def _make_plan(
    group: compat.ParameterGroup,
    index: int,
    names: dict[nn.Parameter, str],
    order: dict[str, int],
    embeddings: set[str],
    config: QSDPConfig,
) -> Plan:
    if group.num_groups > 1:
        raise ValueError(
            f"{_name(group)} has {group.num_groups} parameter meshes in one fully_shard call; "
            "qsdp needs one mesh a call: shard such modules apart"
        )
    if group.offloads_to_cpu:
        raise ValueError(f"{_name(group)} uses CPUOffloadPolicy; shard it without offloading")
    if group.shard_group is None:
        raise ValueError(f"the mesh of {_name(group)} has no shard axis; use fully_shard's mesh")
    if group.reduce_dtype is not None and group.reduce_dtype not in DTYPES:
        raise ValueError(
            f"{_name(group)} reduces gradients in {group.reduce_dtype}; qsdp sends float32, "
            "bfloat16 or float16"
        )
    parameters = []
    for sharded in group.parameters():
        name = names.get(sharded.parameter)
        if name is None:
            raise ValueError(
                f"{_name(group)} shards a parameter that model.named_parameters() does not list; "
                "install qsdp on the root of the sharded model, outside a forward or backward pass"
            )
        if sharded.mesh_ndim > group.mesh_ndim:
            raise ValueError(
                f"{name} is sharded over {sharded.mesh_ndim} mesh dimensions (tensor parallelism "
                f"with FSDP); qsdp supports the {group.mesh_ndim} of fully_shard's own mesh"
            )
        if sharded.is_extension:
            raise ValueError(
                f"{name} brings an all-gather of its own (fsdp_pre_all_gather, as float8 does); "
                "use a plain parameter"
            )
        can_train = sharded.dtype.is_floating_point or sharded.dtype.is_complex
        if can_train and sharded.dtype not in DTYPES:
            raise ValueError(f"{name} is {sharded.dtype}; qsdp sends float32, bfloat16 or float16")
        is_embedding = name in embeddings
        parameters.append(_make_parameter(name, order[name], sharded, config, is_embedding))
    plan = Plan(parameters, index, group.shard_group, config)
    for parameter, sharded in zip(parameters, group.parameters(), strict=True):
        derived = parameter.padded_numel(plan.world_size)
        if derived != sharded.padded_numel:
            raise RuntimeError(
                f"{parameter.name} takes {sharded.padded_numel} values a rank in FSDP2's tables, "
                f"but {derived} by its shape {tuple(parameter.shape)}: this torch "
                f"({torch.__version__}) shards in a way that qsdp does not know"
            )
    return plan


def _make_parameter(
    name: str,
    index: int,
    sharded: compat.ShardedParameter,
    config: QSDPConfig,
    is_embedding: bool,
) -> Parameter:
    bits = config.bits_of(name, is_embedding)
    if not sharded.dtype.is_floating_point:
        bits, why = (32, 32), f"{sharded.dtype} cannot be coded"
    elif config.bits_by_policy(name) is not None:
        why = "policy"
    elif sharded.parameter.dim() < 2:
        bits, why = (32, 32), "norm or bias: fewer than two dimensions"
    else:
        why = "embedding or head" if is_embedding else "default"
    return Parameter(
        name=name,
        index=index,
        shape=sharded.parameter.shape,
        dtype=sharded.dtype,
        shard_dim=sharded.shard_dim,
        weight_bits=bits[0],
        grad_bits=bits[1],
        keeps_bits=config.keeps_bits(name, is_embedding),
        why=why,
    )


def _travel(bits: int, dtype: torch.dtype, *, is_grad: bool = False) -> str:
    if bits <= 8:
        return f"{bits} bits"
    if bits == 16 and dtype == torch.float32:
        return "bfloat16"
    return "raw" if is_grad else f"raw {dtype}".replace("torch.", "")


def _name(group: compat.ParameterGroup) -> str:
    return type(group.module).__name__
