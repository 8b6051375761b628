"""What a user drops is freed: models, handles, optimizers, and all that they made."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import qsdp
from qsdp.compat.parameter_group import parameter_groups
from tests_distributed.support import leftovers
from tests_distributed.support.helpers import Toy, make_batch, make_model, shard, wire_config
from tests_distributed.support.running import Run, selection

STEPS = 3
SCHEDULE = qsdp.ACDCSchedule(steps=STEPS, warmup=1, phase=1, last_dense=0, last_sparse=1)
GRADUAL = qsdp.GMPSchedule(steps=STEPS, sparsity=0.5, initial=0.0, start=1, end=2, every=1)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to use the wire and the methods."""

    ranks: int = 2
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Of the model."""
    reshard: bool = True
    replicas: int = 1
    method: Callable[[Toy, torch.optim.Optimizer], torch.optim.Optimizer] | None = None
    act: Callable[[Toy, qsdp.Handle], object] = lambda model, handle: None
    """What is done after the training."""


def _acdc(model: Toy, base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return qsdp.ACDC(model, base, schedule=SCHEDULE, target=0.5)


def _gmp(model: Toy, base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return qsdp.GMP(model, base, schedule=GRADUAL)


def _set_support(model: Toy, handle: qsdp.Handle) -> None:
    weight: Any = model.blocks[0].get_parameter("qkv.weight")
    mask = torch.rand(weight.to_local().shape) < 0.5
    with torch.no_grad():
        weight.to_local().masked_fill_(~mask, 0)
    handle.set_support({weight: mask})
    _backward(model, STEPS)


def _compressed(model: Toy, handle: qsdp.Handle) -> None:
    with qsdp.compressed(model, 0.5), handle.exact(), torch.inference_mode():
        model(*make_batch(model, STEPS))


def _measured(model: Toy, handle: qsdp.Handle) -> None:
    with handle.measuring():
        _backward(model, STEPS)
    handle.errors()
    handle.load_state_dict(handle.state_dict())
    handle.report()


def _simulated(model: Toy, handle: qsdp.Handle) -> None:
    whole = make_model(2)
    simulation = qsdp.simulate(
        whole,
        qsdp.QSDPConfig(),
        world_size=2,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True),
        groups=["blocks.0", "blocks.1"],
    )
    simulation.pass_([[make_batch(whole, 0, rank) for rank in range(2)]])
    simulation.update()
    made = weakref.ref(simulation), weakref.ref(whole)
    del simulation, whole
    gc.collect()
    assert [each() for each in made] == [None, None]


def _fails_in_forward(model: Toy, handle: qsdp.Handle) -> None:
    def fail(*_: object) -> None:
        raise LookupError

    watching = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(LookupError):
        _backward(model, STEPS)
    watching.remove()


def _fails_in_backward(model: Toy, handle: qsdp.Handle) -> None:
    def fail(_: Tensor) -> None:
        raise LookupError

    def watch(module: object, args: object, output: Tensor) -> None:
        output.register_hook(fail)

    watching = model.blocks[0].register_forward_hook(watch)
    with pytest.raises(LookupError):
        _backward(model, STEPS)
    watching.remove()


def _stays_gathered(model: Toy, handle: qsdp.Handle) -> None:
    model(*make_batch(model, STEPS))  # a graph that no backward pass frees
    model.unshard(async_op=True)  # type: ignore[operator]


def _compile(model: Toy, handle: qsdp.Handle) -> None:
    for block in model.blocks:
        block.compile(backend="aot_eager")
    _backward(model, STEPS)


BY_NODE: dict[str, Any] = {"gather": "delta", "delta_codes": "node", "ranks_per_node": 2}
WAYS = {
    "plain": Way(),
    "alone": Way(ranks=1),
    "bf16": Way(config={"weight_bits": 16, "grad_bits": 16}),
    "not resharded": Way(reshard=False),
    "tied, frozen and unused": Way(options={"tied": True, "frozen": True, "unused": True}),
    "re-computation": Way(options={"checkpointing": True}),
    "gather once": Way(config={"gather": "once"}, options={"frozen": True}),
    "gather delta": Way(config={"gather": "delta"}, options={"frozen": True}),
    "learned levels": Way(config={"weight_bits": 4, "levels": "learned", "level_steps": (1, 2)}),
    "budget": Way(config={"budget": 5.0}),
    "two hops": Way(ranks=4, config={"reduce": "two-hop", "ranks_per_node": 2}),
    "replicas": Way(ranks=4, replicas=2),
    "CrAM": Way(method=qsdp.CrAM),
    "SAM": Way(method=qsdp.SAM),
    "AC/DC": Way(method=_acdc),
    "GMP": Way(method=_gmp),
    "set_support": Way(act=_set_support),
    "compressed": Way(act=_compressed),
    "measured": Way(act=_measured),
    "simulate": Way(act=_simulated),
    "an exception in forward": Way(act=_fails_in_forward),
    "an exception in backward": Way(act=_fails_in_backward),
    "an exception in backward, gather once": Way(act=_fails_in_backward, config={"gather": "once"}),
    "an exception in forward, gather delta": Way(act=_fails_in_forward, config={"gather": "delta"}),
    "gathers under way": Way(act=_stays_gathered),
    "gathers under way, gather delta": Way(act=_stays_gathered, config={"gather": "delta"}),
    "codes by node": Way(ranks=4, config=BY_NODE, options={"frozen": True}),
    "an exception in forward, codes by node": Way(ranks=4, act=_fails_in_forward, config=BY_NODE),
    "gathers under way, codes by node": Way(ranks=4, act=_stays_gathered, config=BY_NODE),
    "torch.compile": Way(act=_compile),
    "removed": Way(act=lambda model, handle: handle.remove()),
}


def _backward(model: Toy, step: int) -> Tensor:
    loss: Tensor = model(*make_batch(model, step))
    torch.autograd.backward(loss)
    return loss.detach()


def _train(way: Way, mesh: DeviceMesh | None) -> dict[str, weakref.ref[Any]]:
    """Train, and drop all that was made. Returns weak references to it."""
    shards = None if mesh is None else mesh["shard"]
    model = make_model(1, **way.options)
    shard(model, reshard=way.reshard, nested=False, mesh=shards)
    replicas = None if mesh is None else mesh["replicate"]
    config = wire_config(64, **way.config)
    handle = qsdp.install(model, config, replicate_mesh=replicas)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    if way.method is not None:
        optimizer = way.method(model, optimizer)
        optimizer.share_support(handle.set_support)
    for step in range(STEPS):
        if isinstance(optimizer, qsdp.CrAM | qsdp.SAM):
            optimizer.step(lambda step=step: _backward(model, step))
        else:
            _backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    way.act(model, handle)
    made: dict[str, Any] = {"the model": model, "the handle": handle, "the optimizer": optimizer}
    made |= {f"the parameter {name}": p for name, p in model.named_parameters()}
    for group in parameter_groups(model):
        made |= {
            f"place {place} of {type(group.module).__name__}, gathered": tensor
            for place, tensor in enumerate(group.unsharded_parameters())
            if tensor is not None
        }
    return {name: weakref.ref(thing) for name, thing in made.items()}


def _mesh_of(way: Way) -> DeviceMesh | None:
    """The user's own."""
    if way.replicas == 1:
        return None
    sizes = way.replicas, way.ranks // way.replicas
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))


def _alive(name: str) -> list[str]:
    way = WAYS[name]
    mesh = _mesh_of(way)
    made = _train(way, mesh)
    gc.collect()
    return [name for name, thing in made.items() if thing() is not None]


@selection("way", [(way,) for way in WAYS if "by node" not in way], tuple(WAYS))
def test_what_was_dropped_is_freed(run: Run, way: str) -> None:
    for alive in run(WAYS[way].ranks, _alive, way):
        assert alive == []


ROUNDS, EARLY = 14, 3
"""After the early ones torch has made all that it makes once."""


def _added(name: str) -> tuple[list[str], float]:
    """What rounds of building, training and dropping add to the process, and MiB of memory."""
    # Large enough that memory shows a model that stays: half a MiB each on a rank.
    way = replace(WAYS[name], options=WAYS[name].options | {"width": 96, "hidden": 96})
    mesh = _mesh_of(way)
    for done in range(1, ROUNDS + 1):
        _train(way, mesh)
        gc.collect()
        dist.barrier()
        if done == EARLY:
            before, resident = leftovers.held(), leftovers.resident_mib()
    return leftovers.added_since(before), leftovers.resident_mib() - resident


@pytest.mark.parametrize(
    "way",
    [
        "AC/DC",
        # What others leave the test above finds, and the pool after each call.
        pytest.param("an exception in backward, gather once", marks=pytest.mark.heavy),
        pytest.param("two hops", marks=pytest.mark.heavy),
    ],
)
def test_rounds_of_training_add_nothing_to_a_process(run: Run, way: str) -> None:
    for added, mib in run(WAYS[way].ranks, _added, way):
        assert added == []
        assert mib < 4
