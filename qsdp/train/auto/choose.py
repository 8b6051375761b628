"""``--qsdp-bits auto``: measure, decide by the cost model, and say why.

What is measured leaves nothing behind: it has a block of its own, buffers of its own and a random
generator of its own, and all of that is gone when the run's model is built.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qsdp.comm.group_plan import Parameter, Plan
from qsdp.comm.nodes import Nodes, launched_ranks
from qsdp.comm.topology import StageGroup, open_stages, split
from qsdp.common.collective_errors import CollectiveError, collective
from qsdp.common.dtypes import of_precision
from qsdp.common.model_structure import embedding_names
from qsdp.common.user_errors import quoted
from qsdp.config import QSDPConfig
from qsdp.models.registry import family_of_size
from qsdp.models.size import ModelSize
from qsdp.train.auto.cost_model import (
    CODED,
    STOCK,
    Measured,
    ModelledGroup,
    WireWay,
    decide_by_cost,
)
from qsdp.train.auto.link_speed import Links
from qsdp.train.auto.machine_speed import CODEC_S, codec_s, computation_s, free_bytes, optimizer_s
from qsdp.train.config import TrainConfig
from qsdp.train.wire_flags import AUTO, CHOSEN
from qsdp.train.world import World


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What ``--qsdp-bits auto`` came to. All of it can be written as JSON."""

    settings: dict[str, Any]
    """The flags that would have asked for the same; None is one left out."""
    what: str
    why: str
    predicted_s: dict[str, float]
    """Seconds a step of each way."""
    measured: dict[str, Any] | None
    """What was measured; None with one rank."""
    took_s: float

    @property
    def line(self) -> str:
        """What was chosen and why, in one line."""
        return f"--qsdp-bits {AUTO}: {self.what}, since {self.why}"

    @property
    def comment(self) -> str:
        """The same for a TOML file, with all that was measured."""
        rest = {"predicted_s": self.predicted_s, "measured": self.measured}
        return f"# {self.line}\n" + "".join(
            f"# {name}: {json.dumps(value)}\n" for name, value in rest.items()
        )


def is_choice(record: dict[str, Any]) -> bool:
    """Whether ``record`` is what ``asdict`` makes of a ``Choice``: a file may hold anything."""
    settings = record.get("settings")
    return (
        record.keys() == {field.name for field in fields(Choice)}
        and isinstance(settings, dict)
        and settings.keys() <= {*CHOSEN}
        and settings.get("qsdp_bits", AUTO) != AUTO
        and all(isinstance(record[name], str) for name in ("what", "why"))
        and all(record[name].isprintable() for name in ("what", "why"))
    )


def choose(config: TrainConfig, size: ModelSize, world: World) -> Choice:
    """What a run of ``config`` is to send, the same on all ranks. A collective of all of them.

    Raises:
        StopRequested: On all ranks, once one of them was told to end.
        CollectiveError: A collective failed.
    """
    if world.size == 1:
        return Choice(
            settings=WireWay(bits=STOCK).settings(has_nodes=False),
            what=str(WireWay(bits=STOCK)),
            why="one rank sends nothing",
            predicted_s={},
            measured=None,
            took_s=0.0,
        )
    started = time.perf_counter()
    measured = measure_for_choice(config, size, world)
    if world.device.type != "cpu":
        torch.accelerator.empty_cache()  # pieces of other sizes than the run will ask for
    choice = world.on_main(lambda: _choice_by_cost(measured, started))
    world.stop.check()
    return choice


def _choice_by_cost(measured: Measured, started: float) -> Choice:
    way, predicted = decide_by_cost(measured)
    stock = WireWay(bits=STOCK)
    few = measured.too_few_bytes
    why = (
        f"the link carries {measured.link_mbit_per_s:,.0f} Mbit/s a rank"
        f"{'' if few is None else f' (measured with {few:,} bytes only)'} and a step computes "
        f"{measured.compute_s:.3g} s: {predicted[way]:.3g} s a step predicted"
    )
    fastest = min(predicted, key=lambda each: predicted[each])
    if way != fastest:
        spares = "sends more bits" if way.bits > fastest.bits else "takes less memory or fewer hops"
        why += f", {predicted[fastest]:.3g} s with {fastest}, hardly less, and it {spares}"
    others = [each for each in predicted if each not in (way, fastest)]
    other = stock if stock in others else min(others, key=lambda each: predicted[each])
    why += f", {predicted[other]:.3g} s with {other}"
    if way.gather == "once":
        why += f"; it keeps {_kept_in_words(measured, way)}"
    roomy = decide_by_cost(replace(measured, free_bytes=None))[0]
    if roomy.gather == "once" and roomy != way:
        why += f"; {roomy} would keep {_kept_in_words(measured, roomy)}, too much of what is free"
    return Choice(
        settings=way.settings(has_nodes=measured.ranks_per_node > 1),
        what=str(way),
        why=why,
        predicted_s={str(each): seconds for each, seconds in predicted.items()},
        measured=json.loads(json.dumps(asdict(measured))),  # as it comes back from a file
        took_s=time.perf_counter() - started,
    )


def _kept_in_words(measured: Measured, way: WireWay) -> str:
    kept = measured.kept_bytes(way)
    return f"{kept / 1e6:,.1f} MB" if kept > 1e6 else f"{kept / 1e3:,.1f} kB"


def measure_for_choice(config: TrainConfig, size: ModelSize, world: World) -> Measured:
    """Measure what to choose by: computation, codec and link, in ``links.LIMIT_S`` seconds or so.

    1. Each rank computes and codes by itself, bounded by its own clock; the slowest rank counts.
    2. What is left of the time goes to the link. There ranks decide by numbers that they have
       agreed on, so that all take the same collectives.
    """
    started = time.perf_counter()
    group = world.mesh.get_group()
    wires = {bits: QSDPConfig(weight_bits=bits, grad_bits=bits) for bits in CODED}
    sizes = _sizes(config, size, wires, group)
    free, (block, root), rate = world.together(
        lambda: (
            free_bytes(world.device),
            computation_s(config, size, world.device),
            optimizer_s(world.device),
        )
    )
    block_values, root_values = (sizes[part]["values"] for part in ("block", "root"))
    world.stop.check()
    coding = world.together(
        lambda: {
            bits: codec_s(wire, block_values, world.device, CODEC_S / len(wires))
            for bits, wire in wires.items()
        }
    )
    world.stop.check()
    all_values = root_values + size.num_layers * block_values
    own = [*block, *root, all_values * rate, *(s for both in coding.values() for s in both)]
    with _measuring_together(world):
        stages = _stages(world, group)
        slowest = torch.tensor(
            [*own, -free, time.perf_counter() - started], dtype=torch.float64, device=world.device
        )
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        *own, free, spent = slowest.tolist()
        try:
            most = {
                name: max(sizes["block"][kind].values())
                for name, kind in (("gather", "gather_bytes"), ("reduce", "reduce_bytes"))
            }
            links = Links(group, world.device, stages, most, started, spent, world.stop).measured()
        finally:
            for stage in stages:
                stage.close()
    coded = own[5:]
    return Measured(
        num_ranks=world.size,
        ranks_per_node=stages[0].size if stages else 1,
        has_streams=world.backend == "nccl",
        num_blocks=size.num_layers,
        passes=config.method.PASSES,
        micro_batches=config.run.grad_accum,
        root=ModelledGroup(**sizes["root"], forward_s=own[2], backward_s=own[3]),
        block=ModelledGroup(**sizes["block"], forward_s=own[0], backward_s=own[1]),
        free_bytes=None if math.isinf(free) else int(-free),
        optimizer_s=own[4],
        encode_s=dict(zip(CODED, coded[::2], strict=True)),
        decode_s=dict(zip(CODED, coded[1::2], strict=True)),
        **links,
    )


@contextmanager
def _measuring_together(world: World) -> Iterator[None]:
    """Inside, ranks measure together for a choice: the fault of one is the end of all.

    Each says it in one sentence, whatever it is.
    """
    what = "measuring of the link"
    try:
        with collective(what):
            yield
    except CollectiveError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise CollectiveError(
            f"the {what} failed on rank {world.rank}: {quoted(error)}."
        ) from error


def _sizes(
    config: TrainConfig,
    size: ModelSize,
    wires: Mapping[int, QSDPConfig],
    group: dist.ProcessGroup,
) -> dict[str, dict[str, Any]]:
    """What ``ModelledGroup`` holds of the root's group and of a block's, except the computation."""
    with torch.device("meta"):
        model = family_of_size(size).build(replace(size, num_layers=1))
    dtype = of_precision(config.run.precision)
    found: dict[str, dict[str, Any]] = {}
    for part in ("root", "block"):
        facts: dict[str, Any] = {"gather_bytes": {}, "reduce_bytes": {}, "local_bytes": 0}
        for bits, wire in wires.items():
            plan = _plan(model, wire, dtype, group, is_block=part == "block")
            facts["gather_bytes"][bits] = plan.gather(plan.places).payload_bytes
            # Gradients are reduced in fp32 at either precision.
            reduces = (
                plan.reduce(plan.places, torch.float32, is_local=is_local).payload_bytes
                for is_local in (False, True)
            )
            facts["reduce_bytes"][bits], facts["local_bytes"] = reduces
            values = sum(p.padded_numel(group.size()) for p in plan.parameters)
            facts["values"] = values
            facts["gather_bytes"][STOCK] = values * dtype.itemsize
            facts["reduce_bytes"][STOCK] = values * 4
        found[part] = facts
    return found


def _plan(
    model: nn.Module,
    wire: QSDPConfig,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    *,
    is_block: bool,
) -> Plan:
    """How a block, or the rest of ``model``, would travel, as ``install`` would plan it."""
    tables = embedding_names(model)
    parameters = []
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if name.startswith("blocks.") != is_block:
            continue
        bits = wire.bits_of(name, name in tables) if parameter.dim() >= 2 else (32, 32)
        parameters.append(
            Parameter(
                name=name,
                index=index,
                shape=parameter.shape,
                dtype=dtype,
                shard_dim=0,
                weight_bits=bits[0],
                grad_bits=bits[1],
                keeps_bits=False,
                why="",
            )
        )
    return Plan(parameters, 0, group, wire)


def _stages(world: World, group: dist.ProcessGroup) -> tuple[StageGroup, ...]:
    """Groups inside nodes and between them, where there are several of several ranks each."""
    sizes: list[int] = [1] * world.size
    dist.all_gather_object(sizes, world.together(launched_ranks))
    nodes = world.together(lambda: Nodes(dict(enumerate(sizes))))
    found = split(group, nodes, None, QSDPConfig())
    return () if found.is_flat else open_stages(group, found.sizes, None)
