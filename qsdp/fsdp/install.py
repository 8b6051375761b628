"""`install(model, config) -> handle`: the quantized wire on a model that the user sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from qsdp import compat
from qsdp.comm.clock import Clock
from qsdp.comm.plan import DTYPES, Parameter, Plan, embedding_names
from qsdp.comm.topology import Topology
from qsdp.comm.traffic import Traffic
from qsdp.config import QSDPConfig
from qsdp.fsdp import agreement
from qsdp.fsdp.hooks import AllGather, GradRecorder, ReduceScatter, Wire
from qsdp.fsdp.report import Report, Row


def install(model: nn.Module, config: QSDPConfig | None = None) -> "Handle":
    """Send the weights and gradients of ``model`` over the wire as ``config`` says.

    A collective: all ranks of the model's mesh call it, and make sure that they agree.

    Args:
        model: a module on which `fully_shard` was called, itself or on submodules. Its parameters
            stay plain DTensors; optimizers, checkpoints and clipping work as before.
        config: bits, buckets, rounding; None takes the defaults (8 bits both ways).

    Returns:
        A `Handle`: report, traffic counters, state for checkpoints, removal.

    Raises:
        ValueError: the model is not sharded by FSDP2, has the wire already, or uses what qsdp does
            not support: CPUOffloadPolicy, per-parameter meshes, tensor parallelism, a mesh without
            a shard axis, float64 in parameters or reduces, parameters with an all-gather of their
            own; or a policy pattern matches no parameter.
        RuntimeError: the ranks do not have the same model and config.
    """
    config = QSDPConfig() if config is None else config
    if not isinstance(config, QSDPConfig):
        raise ValueError(f"config is a {type(config).__name__}; give a qsdp.QSDPConfig")
    groups = compat.parameter_groups(model)
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no FSDP2 parameters; call fully_shard before qsdp.install"
        )
    if any(isinstance(group.comms()[0], AllGather) for group in groups):
        raise ValueError(
            f"qsdp is installed on this {type(model).__name__} already; call handle.remove() first"
        )
    return Handle(model, config, groups)


class Handle:
    """The quantized wire of one model. Made by `install`."""

    def __init__(
        self, model: nn.Module, config: QSDPConfig, groups: list[compat.ParameterGroup]
    ) -> None:
        self.config = config
        self.traffic = Traffic(Topology())
        self._groups = groups
        self._clock = Clock(config.seed)
        self._wire = Wire(self._clock, self.traffic)
        self._is_removed = False
        self._reshard()
        names = {p: compat.name_without_wrappers(name) for name, p in model.named_parameters()}
        order = {name: i for i, name in enumerate(names.values())}
        meshes = dict.fromkeys(group.mesh for group in groups)
        everyone = [axis for mesh in meshes for axis in mesh.get_all_groups()]
        with agreement.mistakes_shared(everyone):
            _check_policy(config, list(order))
            embeddings = set(map(compat.name_without_wrappers, embedding_names(model)))
            self._plans = [
                _make_plan(group, index, names, order, embeddings, config)
                for index, group in enumerate(groups)
            ]
        planned = {p.name for plan in self._plans for p in plan.parameters}
        self._outside = {
            order[name]: Row(name, tuple(p.shape), None, "none", "none", "not sharded by FSDP2")
            for p, name in names.items()
            if name not in planned
        }
        agreement.check(everyone, agreement.describe(config, groups, self._plans))
        self._before = [group.comms() for group in groups]
        for group, plan in zip(groups, self._plans, strict=True):
            recorder = GradRecorder(plan, group)
            self._wire.recorders.append(recorder)
            all_gather = AllGather(plan, self._wire, recorder, group.regather_world_size)
            reduce_scatter = ReduceScatter(plan, self._wire, recorder)
            _set_comms(group, all_gather, reduce_scatter, force_sum=True)

    def report(self) -> Report:
        """How every parameter travels, at what bits, and why."""
        rows = dict(self._outside)
        for plan in self._plans:
            for p in plan.parameters:
                weight = _travel(p.weight_bits, p.dtype)
                grad = _travel(p.grad_bits, None) if p.is_trainable else "none"
                rows[p.index] = Row(p.name, tuple(p.shape), plan.index, weight, grad, p.why)
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

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to draw the same random numbers: plain integers."""
        return self._clock.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self._clock.load_state_dict(state)

    def remove(self) -> None:
        """Give FSDP2 back the collectives it had before `install`."""
        if self._is_removed:
            raise RuntimeError("this handle was removed already; call qsdp.install again")
        self._is_removed = True
        for recorder in self._wire.recorders:
            recorder.remove()
        for group, (gather, reduce, force_sum) in zip(self._groups, self._before, strict=True):
            _set_comms(group, gather, reduce, force_sum)
        self._reshard()

    def _reshard(self) -> None:
        for group in self._groups:
            group.module.reshard()

    def _remarks(self) -> Iterator[str]:
        if self.config.rounding == "nearest":
            yield "rounding to nearest is biased: weights and gradients keep a systematic error"
        sizes = {plan.world_size for plan in self._plans}
        if sizes == {1}:
            yield "one rank: FSDP2 bypasses the collectives, weights and gradients are exact"
        if any(group.replicas > 1 for group in self._groups):
            yield "HSDP: the all-reduce between replicas is FSDP2's own, in full precision"
        if any(group.regather_world_size for group in self._groups):
            yield "reshard_after_forward=<int>: second gathers carry decoded weights, raw"


def _set_comms(
    group: compat.ParameterGroup, all_gather: Any, reduce_scatter: Any, force_sum: bool
) -> None:
    group.module.set_custom_all_gather(all_gather)
    group.module.set_custom_reduce_scatter(reduce_scatter)
    group.module.set_force_sum_reduction_for_comms(force_sum)


def _check_policy(config: QSDPConfig, names: list[str]) -> None:
    for pattern, _ in config.policy:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"the policy pattern {pattern!r} matches no parameter; names look like "
                f"{names[0]!r}, and * stands for any characters"
            )


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
        if sharded.dtype.is_floating_point and sharded.dtype not in DTYPES:
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
    if not sharded.parameter.requires_grad:
        why += ", frozen"
    return Parameter(
        name=name,
        index=index,
        shape=sharded.parameter.shape,
        dtype=sharded.dtype,
        shard_dim=sharded.shard_dim,
        weight_bits=bits[0],
        grad_bits=bits[1],
        is_trainable=sharded.parameter.requires_grad,
        why=why,
    )


def _travel(bits: int, dtype: torch.dtype | None) -> str:
    if bits <= 8:
        return f"{bits} bits"
    if bits == 16:
        return "bfloat16"
    return "raw" if dtype is None else f"raw {dtype}".replace("torch.", "")


def _name(group: compat.ParameterGroup) -> str:
    return type(group.module).__name__
