"""Every switch of FSDP2 means with the wire what it means without it, or is refused in a sentence.

The rows are those of the table in docs/fsdp2.md. Each trains for three micro-batches, the last of
which belongs to another step, and notes all that its switch may change: gradients and whether they
are there, what is gathered when, types, and whether FSDP2 took it.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
    share_comm_ctx,
)
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import qsdp
from qsdp import compat
from qsdp.comm.traffic import Traffic
from tests_distributed.conftest import Run
from tests_distributed.support.helpers import make_batch, make_model, wire_config

MICRO_BATCHES = 3
NEXT_STEP = 2  # the first micro-batch of the second step

# By name: the replicas of stock FSDP2, what qsdp.QSDPConfig is given, whether replicas are qsdp's.
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "shards": (1, {}, False),
    "gathered once": (1, {"gather": "once"}, False),
    "two hops": (1, {"reduce": "two-hop", "ranks_per_node": 2}, False),
    "native HSDP": (2, {}, False),
    "replicate_mesh": (2, {}, True),
}
REPLICATED = (3, 4)
# The micro-batch before which a switch is set, or before qsdp.install.
TIMES: dict[str, int] = {"before install": -1, "after install": 0, "in between": 1}
Row = tuple[str, str, str, int]  # a switch, a layout, a time, and bits
AT_ONCE = ("before install",)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One switch, and how it is used."""

    set: Callable[[Any], object] | None = None
    """Called once with the model."""
    each: Callable[[Any, int], object] | None = None
    """Called with the model before each micro-batch, whose number it is given."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `fully_shard`."""
    root: dict[str, Any] = field(default_factory=dict)
    """More, of the root alone."""
    model: dict[str, Any] = field(default_factory=dict)
    """Of `make_model`."""
    ignored: str = ""
    """The name of a parameter for `ignored_params`."""
    note: Callable[[Any], object] | None = None
    """What else of the model to compare after each micro-batch."""
    refused: Callable[[str, str], str] = lambda layout, time: ""
    """By layout and time a part of the sentence that refuses it; empty where it is honoured."""
    tolerance: float = 1e-5
    """Of 32 bits, relative: sums in a type that is narrower come in another order."""
    times: tuple[str, ...] = tuple(TIMES)
    """At which it can be set here."""


def _policy(**fields: Any) -> Switch:
    narrow = 2e-2 if {torch.bfloat16, torch.float16} & set(fields.values()) else 1e-5
    policy = MixedPrecisionPolicy(**fields)
    return Switch(options={"mp_policy": policy}, tolerance=narrow, times=AT_ONCE)


def _all(name: str, *args: Any) -> Callable[[Any], None]:
    """Call a setter that is not recursive on every module."""

    def set_all(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                getattr(module, name)(*args)

    return set_all


def _by_micro_batch(name: str, *values: bool) -> Switch:
    return Switch(
        each=lambda model, micro: getattr(model, name)(values[micro]), times=("after install",)
    )


def _after_install(what: str) -> Callable[[str, str], str]:
    """Refused at install, or in the next pass."""

    def sentence(layout: str, time: str) -> str:
        return "has a collective of its own" if time == "before install" else what

    return sentence


def _divided(model: Any, name: str) -> None:
    # Stock FSDP2 would multiply before the sum, which gloo cannot.
    _all("set_force_sum_reduction_for_comms", True)(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        _all(name, 3.0)(model)


def _double(tensor: Tensor) -> None:
    tensor.mul_(2)


def _prefetch(model: Any, direction: str) -> None:
    first, second = model.blocks
    if direction == "forward":
        model.set_modules_to_forward_prefetch([first, second])
        first.set_modules_to_forward_prefetch([second])
    else:
        model.set_modules_to_backward_prefetch([second, first])
        second.set_modules_to_backward_prefetch([first])


def _refused_by_fsdp2(layout: str, time: str) -> str:
    return "has a collective of its own" if time == "before install" else "cannot call"


def _state(model: Any) -> Any:
    return model._get_fsdp_state()


class Event:
    """In the place of a GPU's."""


SWITCHES: dict[str, Switch] = {
    "set_is_last_backward": _by_micro_batch("set_is_last_backward", False, False, True),
    "set_requires_gradient_sync": _by_micro_batch("set_requires_gradient_sync", False, False, True),
    "set_requires_all_reduce": _by_micro_batch("set_requires_all_reduce", False, False, True),
    "set_requires_all_reduce, after gradients": _by_micro_batch(
        "set_requires_all_reduce", True, False, True
    ),
    "set_reshard_after_forward": Switch(set=lambda model: model.set_reshard_after_forward(False)),
    "set_reshard_after_forward of the root": Switch(
        set=lambda model: model.set_reshard_after_forward(True, recurse=False)
    ),
    "set_reshard_after_backward": _by_micro_batch("set_reshard_after_backward", False, True, False),
    "set_modules_to_forward_prefetch": Switch(set=lambda model: _prefetch(model, "forward")),
    "set_modules_to_backward_prefetch": Switch(set=lambda model: _prefetch(model, "backward")),
    "set_custom_all_gather": Switch(
        set=_all("set_custom_all_gather", type("Own", (DefaultAllGather,), {})()),
        refused=_after_install("set_custom_all_gather was called"),
    ),
    "set_custom_reduce_scatter": Switch(
        set=_all("set_custom_reduce_scatter", type("Own", (DefaultReduceScatter,), {})()),
        refused=_after_install("set_custom_reduce_scatter was called"),
    ),
    "set_all_reduce_hook": Switch(
        set=_all("set_all_reduce_hook", _double),
        refused=lambda layout, time: (
            ""
            if layout != "replicate_mesh"
            else "has a hook of set_all_reduce_hook"
            if time == "before install"
            else "set_all_reduce_hook was called"
        ),
    ),
    "set_post_optim_event": Switch(
        each=lambda model, micro: model.set_post_optim_event(Event()),
        times=("after install",),
        note=lambda model: _state(model)._state_ctx.post_optim_event,
    ),
    "set_reduce_scatter_divide_factor": Switch(
        set=lambda model: _divided(model, "set_reduce_scatter_divide_factor")
    ),
    "set_gradient_divide_factor": Switch(
        set=lambda model: _divided(model, "set_gradient_divide_factor")
    ),
    "set_force_sum_reduction_for_comms": Switch(
        set=_all("set_force_sum_reduction_for_comms", True)
    ),
    "set_force_sum_reduction_for_comms(False)": Switch(
        set=_all("set_force_sum_reduction_for_comms", False),
        refused=lambda layout, time: "" if time == "before install" else "(False) was called",
    ),
    "set_reduce_scatter_unused_params": Switch(
        set=lambda model: model.set_reduce_scatter_unused_params(True), model={"unused": True}
    ),
    "set_reduce_scatter_max_input_buffers": Switch(
        set=lambda model: model.set_reduce_scatter_max_input_buffers(2),
        note=lambda model: _state(model)._comm_ctx.reduce_scatter_max_input_buffers,
    ),
    "set_separate_reduce_scatter_group": Switch(
        set=lambda model: model.set_separate_reduce_scatter_group(True),
        refused=lambda layout, time: (
            "set_separate_reduce_scatter_group was called" if layout == "two hops" else ""
        ),
    ),
    "set_unshard_in_backward": Switch(set=lambda model: model.embed.set_unshard_in_backward(False)),
    "set_allocate_memory_from_process_group_for_comm": Switch(
        set=_all("set_allocate_memory_from_process_group_for_comm", True),
        refused=_refused_by_fsdp2,
    ),
    "set_symm_mem_for_comm": Switch(
        # Stock FSDP2 would need a GPU.
        set=_all("set_symm_mem_for_comm"),
        refused=_refused_by_fsdp2,
        times=("after install",),
    ),
    "_set_unshard_async_op": Switch(set=lambda model: model._set_unshard_async_op(True)),
    "mesh": Switch(times=AT_ONCE),
    "reshard_after_forward": Switch(options={"reshard_after_forward": True}, times=AT_ONCE),
    "reshard_after_forward, int": Switch(options={"reshard_after_forward": 2}, times=AT_ONCE),
    "shard_placement_fn": Switch(
        options={"shard_placement_fn": lambda p: Shard(1) if p.dim() == 2 else None},
        model={"width": 16, "hidden": 8, "vocab_size": 16},
        times=AT_ONCE,
    ),
    "ignored_params": Switch(ignored="head.weight", times=AT_ONCE),
    "MixedPrecisionPolicy.param_dtype": _policy(param_dtype=torch.bfloat16),
    "MixedPrecisionPolicy.reduce_dtype": _policy(reduce_dtype=torch.bfloat16),
    "MixedPrecisionPolicy.reduce_dtype, wider": _policy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    ),
    "MixedPrecisionPolicy.reduce_dtype, half": _policy(reduce_dtype=torch.float16),
    "MixedPrecisionPolicy.output_dtype": Switch(
        root={"mp_policy": MixedPrecisionPolicy(output_dtype=torch.bfloat16)},
        tolerance=2e-2,
        times=AT_ONCE,
    ),
    "MixedPrecisionPolicy.cast_forward_inputs": _policy(
        param_dtype=torch.bfloat16, cast_forward_inputs=False
    ),
    "offload_policy": Switch(options={"offload_policy": OffloadPolicy()}, times=AT_ONCE),
    "offload_policy, CPUOffloadPolicy": Switch(
        options={"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        refused=lambda layout, time: "uses CPUOffloadPolicy",
        times=AT_ONCE,
    ),
    "register_fsdp_forward_method": Switch(
        set=lambda model: register_fsdp_forward_method(model.blocks[0].mlp, "forward"),
        times=AT_ONCE,
    ),
    "share_comm_ctx": Switch(
        set=lambda model: share_comm_ctx([model, *model.blocks]), times=AT_ONCE
    ),
}
ROWS = {
    name: switch
    for name, switch in SWITCHES.items()
    if not name.startswith(("set_", "_set_")) or hasattr(FSDPModule, re.split(r"\W", name)[0])
}


def _train(row: Row, mesh: DeviceMesh, is_stock: bool) -> Any:
    """What came of it by micro-batch, or the sentence that refused it."""
    name, layout, time, bits = row
    switch, start = SWITCHES[name], TIMES[time]
    replicas, config, is_ours = LAYOUTS[layout]
    is_native = replicas > 1 and (is_stock or not is_ours)
    model = make_model(1, **switch.model)
    options = dict(switch.options)
    if switch.ignored:
        options["ignored_params"] = {model.get_parameter(switch.ignored)}
    options["mesh"] = mesh if is_native else mesh["shard"]
    for module in (model.embed, *model.blocks):
        fully_shard(module, **options)
    fully_shard(model, **options | switch.root)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = _see(model)
    found: list[Any] = []
    handle = None
    try:
        if start < 0:
            _set(switch, model, 0)
        if not is_stock:
            handle = qsdp.install(
                model,
                wire_config(32, weight_bits=bits, grad_bits=bits, **config),
                replicate_mesh=mesh["replicate"] if is_ours else None,
            )
        for micro in range(MICRO_BATCHES):
            if micro == NEXT_STEP:
                optimizer.step()
                optimizer.zero_grad()
            if micro == start:
                _set(switch, model, micro)
            elif micro > start and switch.each is not None:
                switch.each(model, micro)
            loss = model(*make_batch(model, micro))
            loss.backward()
            grads = {
                name: None if p.grad is None else _local(p.grad)
                for name, p in model.named_parameters()
            }
            note = None if switch.note is None else switch.note(model)
            found.append((grads, [loss.dtype, _gathered(model), note, *seen], float(loss)))
            seen.clear()
    except (ValueError, RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if handle is not None:
            handle.remove()
    return found


def _set(switch: Switch, model: Any, micro: int) -> None:
    if switch.set is not None:
        switch.set(model)
    if switch.each is not None:
        switch.each(model, micro)


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()


def _gathered(model: nn.Module) -> list[bool]:
    """Of each group, whether its weights are there or on their way."""
    groups = compat.parameter_groups(model)
    return [g.is_gathered or g._group._all_gather_result is not None for g in groups]


def _see(model: Any) -> list[Any]:
    """A list of what blocks are given, and what is gathered then, in both passes."""
    seen: list[Any] = []

    def forward(module: nn.Linear, args: tuple[Tensor]) -> None:
        seen.append((_gathered(model), module.weight.dtype, args[0].dtype))

    def backward(module: nn.Linear, grads: tuple[Tensor]) -> None:
        seen.append((_gathered(model), grads[0].dtype))

    for block in model.blocks:
        block.mlp.down.register_forward_pre_hook(forward)
        block.mlp.down.register_full_backward_pre_hook(backward)
    return seen


def _beside_stock(rows: list[Row]) -> list[tuple[Any, Any]]:
    """Of each row what comes of it, and of stock FSDP2 where it is not refused."""
    ranks = dist.get_world_size()
    axes = ("replicate", "shard")
    meshes = {
        n: init_device_mesh("cpu", (n, ranks // n), mesh_dim_names=axes)
        for n in sorted({LAYOUTS[layout][0] for _, layout, *_ in rows})
    }
    stock: dict[tuple[int, str], Any] = {}
    found = []
    for row in rows:
        name, layout, time, _ = row
        replicas = LAYOUTS[layout][0]
        if not SWITCHES[name].refused(layout, time) and (replicas, time) not in stock:
            stock[replicas, time] = _train(row, meshes[replicas], True)
        found.append((_train(row, meshes[replicas], False), stock.get((replicas, time))))
    return found


def _rows() -> list[Any]:
    """By switch. Each goes with one layout, where it is refused with all; layouts, every other time
    one of replicas, times and bits take turns. All else is heavy."""
    by_switch = []
    for i, (name, switch) in enumerate(ROWS.items()):
        every = set(itertools.product([name], LAYOUTS, switch.times, (32, 8)))
        chosen = {
            (name, layout, time, 8 if i % 5 == j else 32)
            for j, layout in enumerate(LAYOUTS)
            for time in [switch.times[(i + (j in REPLICATED)) % len(switch.times)]]
            if j == (REPLICATED[i // 2 % len(REPLICATED)] if i % 2 else i // 2 % 3)
            or switch.refused(layout, time)
        }
        by_switch.append(pytest.param(sorted(chosen), id=name))
        for time in switch.times:
            others = sorted(row for row in every - chosen if row[2] == time)
            heavy = pytest.param(others, id=f"{name}, {time}", marks=pytest.mark.heavy)
            by_switch.append(heavy)
    return by_switch


@pytest.mark.parametrize("rows", _rows())
def test_a_switch_means_what_it_means_without_the_wire_or_is_refused(
    run: Run, rows: list[Row]
) -> None:
    for ranks in sorted({_ranks(row) for row in rows}):
        some = [row for row in rows if _ranks(row) == ranks]
        for everything in run(ranks, _beside_stock, some):
            for row, (found, stock) in zip(some, everything, strict=True):
                _assert_means_the_same(row, found, stock)


def _ranks(row: Row) -> int:
    """Four where there are nodes or replicas, two where there are none."""
    name, layout, *_ = row
    is_flat = layout in ("shards", "gathered once") and name != "reshard_after_forward, int"
    return 2 if is_flat else 4


def _assert_means_the_same(row: Row, found: Any, stock: Any) -> None:
    name, layout, time, bits = row
    if sentence := SWITCHES[name].refused(layout, time):
        assert isinstance(found, str), row
        assert sentence in found, row
        assert "\n" not in found, row
    else:
        assert isinstance(stock, list), stock
        _assert_alike(row, found, stock, 0.15 if bits == 8 else SWITCHES[name].tolerance)


def _assert_alike(row: Any, found: Any, stock: Any, tolerance: float) -> None:
    assert isinstance(found, list), (row, found)
    for micro, (mine, theirs) in enumerate(zip(found, stock, strict=True)):
        (grads, notes, loss), (stock_grads, stock_notes, stock_loss) = mine, theirs
        where = (*row, micro)
        assert notes == stock_notes, where
        assert abs(loss - stock_loss) < tolerance * abs(stock_loss), where
        assert [g is None for g in grads.values()] == [g is None for g in stock_grads.values()]
        pairs = [(grads[n].float(), g.float()) for n, g in stock_grads.items() if g is not None]
        if pairs:
            ours, expected = (
                torch.cat([each.flatten() for each in side]) for side in zip(*pairs, strict=True)
            )
            assert (ours - expected).norm() <= tolerance * expected.norm(), where


def test_the_table_of_the_docs_has_every_switch_of_this_torch() -> None:
    text = (Path(__file__).parents[2] / "docs" / "fsdp2.md").read_text()
    told = set(re.findall(r"^\| `(\w+(?:\.\w+)?)", text, re.MULTILINE))
    tried = {re.split(r"[ ,(]", name)[0] for name in SWITCHES}
    setters = {n for n in dir(FSDPModule) if n.startswith(("set_", "_set_"))}
    policies = {
        f"{policy.__name__}.{name}"
        for policy in (MixedPrecisionPolicy,)
        for name in signature(policy).parameters
    }
    options = {name for name in signature(fully_shard).parameters if name != "module"}
    switches = setters | policies | (options - {"mp_policy"})
    assert switches <= tried | {"dp_mesh_dims"} <= told


def _with_mesh_dims(mesh: DeviceMesh, bits: int, **dims: Any) -> Any:
    """Gradients of a model whose parameters are DTensors of the whole mesh before the sharding, or
    the sentence that refuses it."""
    from torch.distributed.fsdp import DataParallelMeshDims  # torch 2.13

    everywhere = [Replicate(), Replicate()]
    torch.manual_seed(0)
    model: Any = Two()
    for layer in (model.first, model.second):
        for name, parameter in list(layer.named_parameters()):
            whole = distribute_tensor(parameter.data, mesh, everywhere)
            setattr(layer, name, nn.Parameter(whole))
    fully_shard(model, mesh=mesh, dp_mesh_dims=DataParallelMeshDims(**dims))
    if bits:
        try:
            qsdp.install(model, qsdp.QSDPConfig(weight_bits=bits, grad_bits=bits))
        except ValueError as error:
            return str(error)
    batch = torch.randn(3, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    model(DTensor.from_local(batch, mesh, everywhere)).to_local().backward()
    return torch.cat([p.grad.to_local().flatten() for p in model.parameters()])


def _with_all_mesh_dims() -> tuple[list[list[Tensor]], str]:
    # Once: DTensor's caches keep the mesh, and FSDP2 wants this very one.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "second"))
    everything = [
        [_with_mesh_dims(mesh, bits, **dims) for bits in (0, 32, 8)]
        for dims in ({"shard": ("first", "second")}, {"shard": "second", "replicate": "first"})
    ]
    return everything, _with_mesh_dims(mesh, 8, shard="second")


@pytest.mark.skipif(
    "dp_mesh_dims" not in signature(fully_shard).parameters, reason="this torch has no dp_mesh_dims"
)
def test_dimensions_of_a_larger_mesh_are_those_of_a_mesh_of_their_own(run: Run) -> None:
    for everything, refused in run(4, _with_all_mesh_dims):
        for stock, full, coded in everything:
            torch.testing.assert_close(full, stock, rtol=1e-5, atol=1e-6)
            assert 0 < (coded - stock).norm() <= 0.15 * stock.norm()
        assert "is sharded over 2 mesh dimensions" in refused


# --- replicate_mesh while its average is put off ------------------------------------------------


class Two(nn.Module):
    """A layer that is always used, and one that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x_BC: Tensor, is_whole: bool = True) -> Tensor:
        y_BC = self.first(x_BC)
        return (self.second(y_BC) if is_whole else y_BC).square().sum()


class Stage:
    """Two replicas of two ranks."""

    def __init__(self) -> None:
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        torch.manual_seed(0)
        self.model: Any = fully_shard(Two(), mesh=self.mesh["shard"])
        self.handle = qsdp.install(self.model, replicate_mesh=self.mesh["replicate"])

    def train(self, seed: int, *, averages: bool, is_whole: bool = True) -> None:
        generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
        self.model.set_requires_all_reduce(averages)
        self.model(torch.randn(3, 6, generator=generator), is_whole).backward()


def _bytes_of_the_average(put_off: bool) -> int:
    stage = Stage()
    group = set(dist.get_process_group_ranks(stage.mesh["replicate"].get_group()))
    with mock.patch.object(Traffic, "gathered", autospec=True) as gathered:
        for micro in range(3):
            stage.train(micro, averages=not put_off or micro == 2)
    return sum(
        num_bytes
        for _, _, over, num_bytes in (call.args for call in gathered.call_args_list)
        if set(dist.get_process_group_ranks(over)) == group
    )


def test_an_average_that_is_put_off_takes_its_bytes_once(run: Run) -> None:
    each = run(4, _bytes_of_the_average, False)
    assert all(each)
    assert run(4, _bytes_of_the_average, True) == [num_bytes // 3 for num_bytes in each]


def _raise(*_: Any) -> None:
    raise LookupError


def _given_up(how: str) -> list[Tensor]:
    """A step, after one that was given up while the average of its first pass was put off."""
    stage = Stage()
    if how:
        state = stage.handle.state_dict()
        stage.train(5, averages=False)
        assert all(p.grad is None for p in stage.model.parameters())
    if how in ("forward", "backward"):
        hooks = {"forward": "register_forward_hook", "backward": "register_full_backward_hook"}
        hook = getattr(stage.model.first, hooks[how])(_raise)
        with pytest.raises(LookupError):
            stage.train(6, averages=False)
        hook.remove()
    elif how == "abandon_step":
        stage.handle.abandon_step()
    elif how:
        stage.model.reset_iter_state()
    if how:
        stage.model.zero_grad()
        stage.handle.load_state_dict(state)
    stage.train(0, averages=False)
    stage.train(1, averages=True)
    return [p.grad.to_local() for p in stage.model.parameters()]


@pytest.mark.parametrize("how", ["forward", "backward", "abandon_step", "reset_iter_state"])
def test_what_was_put_off_is_dropped_with_its_step(run: Run, how: str) -> None:
    if not hasattr(FSDPModule, "reset_iter_state") and how == "reset_iter_state":
        pytest.skip("this torch has no reset_iter_state")
    torch.testing.assert_close(run(4, _given_up, how), run(4, _given_up, ""), rtol=0, atol=0)


def _said(work: Callable[[], object]) -> str:
    """What refuses ``work``."""
    try:
        work()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def _refused(work: Callable[[Stage], None]) -> str:
    return _said(lambda: work(Stage()))


def _with_other_parameters(stage: Stage, replicas: tuple[int, ...]) -> None:
    """In the first micro-batch of some replicas the second layer is used too."""
    stage.train(0, averages=False, is_whole=dist.get_rank() // 2 in replicas)
    stage.train(1, averages=True, is_whole=False)


@pytest.mark.parametrize("replicas", [(0, 1), (0,), (1,)])
def test_micro_batches_that_use_other_parameters_are_refused(
    run: Run, replicas: tuple[int, ...]
) -> None:
    said = run(4, _refused, partial(_with_other_parameters, replicas=replicas))
    for rank, sentence in enumerate(said):
        is_own = rank // 2 in replicas
        assert ("second.weight and second.bias had a gradient in some" in sentence) == is_own
        assert is_own or "cannot send its part" in sentence


def _with_a_hook(stage: Stage) -> None:
    stage.model.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    stage.train(0, averages=False)


def _removed(stage: Stage) -> None:
    stage.train(0, averages=False)
    stage.handle.remove()


def _outside(stage: Stage) -> None:
    stage.model.set_requires_gradient_sync(False)
    stage.model(torch.ones(3, 6)).backward()
    stage.model.set_requires_gradient_sync(True)
    stage.model.set_requires_all_reduce(False)
    for group in compat.parameter_groups(stage.model):
        group._group.post_backward()


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (_with_a_hook, "has a hook on its gradient"),
        (_outside, "outside a backward pass"),
        (_removed, "wait for their average"),
    ],
)
def test_what_cannot_be_put_off_is_refused(run: Run, work: Any, sentence: str) -> None:
    for said in run(4, _refused, work):
        assert sentence in said


def _hooks_after_removal() -> list[Any]:
    model = fully_shard(Two(), mesh=init_device_mesh("cpu", (2,)))
    handle = qsdp.install(model)
    model.set_all_reduce_hook(_double)
    handle.remove()
    return [group.comms()[3] for group in compat.parameter_groups(model)]


def test_a_hook_that_was_set_after_install_stays(run: Run) -> None:
    assert run(2, _hooks_after_removal) == [[_double]] * 2


def _in_mid_accumulation() -> None:
    stage = Stage()
    stage.train(0, averages=False)
    stage.handle.abandon_step()
    stage.handle.remove()


def test_sums_that_wait_may_be_given_up_for_a_removal(run: Run) -> None:
    run(4, _in_mid_accumulation)


# --- one rank alone -----------------------------------------------------------------------------


def _wholes() -> Any:
    """Layers that FSDP2 takes for models of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    for layer in model:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return model


def _a_later_whole(is_odd: bool) -> None:
    model = _wholes()
    qsdp.install(model)
    if is_odd:
        model[2].set_custom_all_gather(DefaultAllGather())
    model(torch.ones(3, 6))


def _a_part_on_a_mesh_of_its_own(is_odd: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model: Any = Two()
    fully_shard(model.first, mesh=mesh["shard"])
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    qsdp.install(model)
    if is_odd:
        model.first.set_custom_reduce_scatter(DefaultReduceScatter())
    model(torch.ones(3, 6))


def _a_hook(is_odd: bool) -> None:
    stage = Stage()
    if is_odd:
        stage.model.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    stage.train(0, averages=False)
    stage.train(1, averages=True)


def _alone(work: Callable[[bool], None]) -> str:
    return _said(lambda: work(dist.get_rank() == 0))


@pytest.mark.parametrize(
    ("ranks", "work", "sentence"),
    [
        (2, _a_later_whole, "set_custom_all_gather was called"),
        (4, _a_part_on_a_mesh_of_its_own, "set_custom_reduce_scatter was called"),
        (4, _a_hook, "has a hook on its gradient"),
    ],
)
def test_what_one_rank_alone_is_refused_all_hear(
    run: Run, ranks: int, work: Any, sentence: str
) -> None:
    for rank, said in enumerate(run(ranks, _alone, work)):
        assert sentence in said
        assert rank == 0 or "rank 0 cannot do what the others do at a" in said


def _called_by_itself() -> str:
    model = make_model()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    qsdp.install(model)
    model(*make_batch(model, 0))
    _all("set_custom_all_gather", DefaultAllGather())(model)
    with torch.no_grad():
        return _said(lambda: model.blocks[0](torch.ones(1, 2, 10)))


def test_a_part_that_is_called_by_itself_is_refused_too(run: Run) -> None:
    for said in run(2, _called_by_itself):
        assert "set_custom_all_gather was called" in said


# --- several wholes -----------------------------------------------------------------------------


def _edited_between_wholes() -> list[Tensor]:
    model = _wholes().requires_grad_(False)
    qsdp.install(model, qsdp.QSDPConfig(weight_bits=32, gather="once"))
    with torch.no_grad():
        model(torch.ones(3, 6))
        hidden = model[0](torch.ones(3, 6))
        model[2].bias.to_local().add_(1)
        return [model[2](hidden), model[2](hidden)]


def test_a_whole_sees_an_edit_that_came_after_the_call_of_another(run: Run) -> None:
    for first, again in run(2, _edited_between_wholes):
        assert torch.equal(first, again)


def _frozen_between_wholes(is_odd: bool) -> None:
    model = _wholes()
    qsdp.install(model, qsdp.QSDPConfig(gather="once"))
    model(torch.ones(3, 6))
    hidden = model[0](torch.ones(3, 6))
    if is_odd:
        model[2].weight.requires_grad_(False)
    model[2](hidden)


def test_a_whole_that_one_rank_alone_freezes_is_named(run: Run) -> None:
    for said in run(2, _alone, _frozen_between_wholes):
        assert "with frozen parameters" in said


def _in_one_backward(is_odd: bool, way: str) -> None:
    """Two wholes, of which one rank tells the first not to reduce."""
    model = _wholes()
    handle = qsdp.install(model)
    x_BC = torch.ones(3, 6, requires_grad=way == "recomputed")
    if way == "recomputed":
        first = checkpoint(model[0], x_BC, use_reentrant=True)
    elif way == "exact":
        with handle.exact():
            first = model[0](x_BC)
    else:
        first = model[0](x_BC)
    if way == "backward again":
        first.sum().backward(retain_graph=True)
    elif way == "older":
        model[1](x_BC).sum().backward()
    second = model[1](x_BC if way == "backward again" else first)
    if is_odd:
        model[0].set_requires_gradient_sync(False)
    (first + second).sum().backward()


@pytest.mark.parametrize("way", ["recomputed", "exact", "backward again", "older"])
def test_a_backward_pass_speaks_of_all_wholes_that_it_reaches(run: Run, way: str) -> None:
    for said in run(2, _alone, partial(_in_one_backward, way=way)):
        assert "at a backward pass with groups that are not reduced" in said
