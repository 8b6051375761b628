"""Every switch of FSDP2 means with the wire what it means without it, or is refused in a sentence.

The rows are those of the table in docs/fsdp2.md. Each trains for three micro-batches, the last of
which belongs to another step, and notes all that its switch may change: gradients and whether they
are there, what is gathered when, types, and whether FSDP2 took it.
"""

from __future__ import annotations

import itertools
import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import qsdp
from qsdp.compat.parameter_group import parameter_groups
from tests_distributed.support.fsdp2_switches import LAYOUTS, REPLICATED, SWITCHES, TIMES, Switch
from tests_distributed.support.helpers import make_batch, make_model, wire_config
from tests_distributed.support.running import Run
from tests_distributed.support.two_replicas import Two

MICRO_BATCHES = 3
NEXT_STEP = 2  # the first micro-batch of the second step
Row = tuple[str, str, str, int]  # a switch, a layout, a time, and bits
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
    parameters = list(model.parameters())
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
                _descend(parameters)
            if micro == start:
                _set(switch, model, micro)
            elif micro > start and switch.each is not None:
                switch.each(model, micro)
            loss = model(*make_batch(model, micro))
            loss.backward()
            grads = {
                name: None if p.grad is None else _held(p.grad).clone()
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


@torch.no_grad()
def _descend(parameters: list[nn.Parameter]) -> None:
    """A step on what this rank holds: of DTensors, torch would plan it for each new mesh."""
    for parameter in parameters:
        if parameter.grad is not None:
            _held(parameter).sub_(_held(parameter.grad), alpha=0.1)
            parameter.grad = None


def _set(switch: Switch, model: Any, micro: int) -> None:
    if switch.set is not None:
        switch.set(model)
    if switch.each is not None:
        switch.each(model, micro)


def _held(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(model: nn.Module) -> list[bool]:
    """Of each group, whether its weights are there or on their way."""
    groups = parameter_groups(model)
    return [g.is_gathered or g.fsdp_param_group._all_gather_result is not None for g in groups]


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
    """The rows of all switches.

    Each goes with one layout; where it is refused, with all. Layouts, every other time one of
    replicas, times and bits take turns. All else is heavy.
    """
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
    """Gradients of a model whose parameters are DTensors of the whole mesh before the sharding.

    Or the sentence that refuses it.
    """
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
