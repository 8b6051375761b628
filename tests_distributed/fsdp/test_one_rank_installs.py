"""One rank differs at ``qsdp.install``: all ranks raise one sentence, and none hangs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy

import qsdp
from tests_distributed.support.helpers import make_model, shard
from tests_distributed.support.one_rank import (
    Act,
    Point,
    Stage,
    assert_said,
    both,
    cannot_install,
    installs,
    say_at_each,
)
from tests_distributed.support.running import Run, selection


def _install(config: Any = None, **options: Any) -> Act:
    """Install on the model as it is, with this config."""

    def act(stage: Stage) -> None:
        given = qsdp.QSDPConfig(**config) if isinstance(config, dict) else config
        qsdp.install(stage.model, given, **options)

    return act


def _configured(
    there: Mapping[str, Any], what: str, one: str, other: str, **everywhere: Any
) -> Point:
    says = installs(f"installs qsdp with {what}", re.escape(one), re.escape(other))
    return Point(
        there=_install({**everywhere, **there}),
        elsewhere=_install(everywhere),
        says=says,
        config=None,
    )


def _install_anew(**options: Any) -> Act:
    """Shard another model with these options of ``fully_shard``, and install."""

    def act(stage: Stage) -> None:
        qsdp.install(shard(make_model(num_layers=1), **options))

    return act


def _install_on_a_part(stage: Stage) -> None:
    qsdp.install(stage.model.blocks[0])


def _with_nodes(shape: Callable[[int], tuple[int, ...]]) -> Act:
    def act(stage: Stage) -> None:
        meshes = [init_device_mesh("cpu", each) for each in _node_shapes()]
        mine = shape(dist.get_world_size())
        qsdp.install(stage.model, node_mesh=meshes[_node_shapes().index(mine)])

    return act


def _node_shapes() -> list[tuple[int, int]]:
    ranks = dist.get_world_size()
    return [(1, ranks), (ranks, 1)]


def _launched(ranks: str, **config: Any) -> Act:
    """Install where the launcher says that it started so many ranks on this node."""

    def act(stage: Stage) -> None:
        before = os.environ.get("LOCAL_WORLD_SIZE")
        os.environ["LOCAL_WORLD_SIZE"] = ranks
        try:
            qsdp.install(stage.model, qsdp.QSDPConfig(**config))
        finally:
            del os.environ["LOCAL_WORLD_SIZE"]
            if before is not None:
                os.environ["LOCAL_WORLD_SIZE"] = before

    return act


def _remove_after_a_failure(stage: Stage) -> None:
    """Remove the wire on all ranks but the odd one: on the way of an exception no rank waits."""
    if stage.rank != stage.odd:
        try:
            raise ValueError
        except ValueError:
            stage.handle.remove()


def _reduces_unused(stage: Stage) -> None:
    stage.model.set_reduce_scatter_unused_params(True)
    qsdp.install(stage.model)


INSTALL = {
    "local_grad_bits": _configured({"local_grad_bits": 4}, "local_grad_bits", "4", "None"),
    "levels": _configured({"levels": "learned"}, "levels", "'learned'", "'uniform'", weight_bits=4),
    "level_steps": _configured(
        {"level_steps": (3,)}, "level_steps", "(3,)", "None", levels="learned", weight_bits=4
    ),
    "reduce": _configured({"reduce": "flat"}, "reduce", "'flat'", "'auto'"),
    "ranks_per_node": _configured({"ranks_per_node": 1}, "ranks_per_node", "1", "None"),
    "warmup_bits": _configured({"warmup_bits": 16}, "warmup_bits", "16", "None", warmup_steps=1),
    "budget": _configured({"budget": 4}, "budget", "4", "None"),
    "a budget with nothing to allot": Point(
        there=_install({"budget": 5, "policy": (("*", 8),)}),
        elsewhere=_install({"budget": 5}),
        says=cannot_install(r".*budget.*"),
        config=None,
    ),
    "config of a wrong type": Point(
        there=_install("8 bits"),
        elsewhere=_install(),
        says=cannot_install("config is a str: give a qsdp.QSDPConfig"),
        config=None,
    ),
    "node_mesh of a wrong type": Point(
        there=_install(node_mesh=(1, 2)),
        elsewhere=_install(),
        says=cannot_install("node_mesh is a tuple: give a DeviceMesh"),
        config=None,
    ),
    "replicate_mesh of a wrong type": Point(
        there=_install(replicate_mesh=2),
        elsewhere=_install(),
        says=cannot_install("replicate_mesh is a int: give a DeviceMesh"),
        config=None,
    ),
    "node_mesh of another shape": Point(
        there=_with_nodes(lambda ranks: (ranks, 1)),
        elsewhere=_with_nodes(lambda ranks: (1, ranks)),
        says=installs("installs qsdp with node_mesh", r"\(\d, 1\)", r"\(1, \d\)"),
        config=None,
    ),
    "LOCAL_WORLD_SIZE": Point(
        there=_launched("3"),
        elsewhere=_launched("1"),
        says=both(
            r"(rank \d cannot install qsdp \()?LOCAL_WORLD_SIZE is \[.*3.*\] on the ranks .*"
        ),
        config=None,
    ),
    "LOCAL_WORLD_SIZE that is no number": Point(
        there=_launched("two"),
        elsewhere=_launched("1"),
        says=cannot_install("LOCAL_WORLD_SIZE is 'two'.*"),
        config=None,
    ),
    "installed already": Point(
        before=_remove_after_a_failure,
        there=_install(),
        elsewhere=_install(),
        says=cannot_install(r"qsdp is installed on this \w+ already: call handle.remove\(\) first"),
    ),
    "a part of the model": Point(
        there=_install_on_a_part,
        elsewhere=_install(),
        says=both(r"rank \d does not shard .* but rank \d does \(\d+ and \d+ parameters\): .*"),
        config=None,
    ),
    "reduced in another type": Point(
        there=_install_anew(mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)),
        elsewhere=_install_anew(),
        says=installs(
            "has the group of .*", "reduced in torch.bfloat16", "reduced in its own type"
        ),
        config=None,
    ),
    "gathered in another type": Point(
        there=_install_anew(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        elsewhere=_install_anew(),
        says=installs("has embed.weight", "of type torch.bfloat16", "of type torch.float32"),
        config=None,
    ),
    "offloaded": Point(
        there=_install_anew(offload_policy=CPUOffloadPolicy(pin_memory=False)),
        elsewhere=_install_anew(),
        says=cannot_install(r"\w+ uses CPUOffloadPolicy: shard it without offloading"),
        config=None,
    ),
}
if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):  # came with torch 2.13
    INSTALL["reduce_scatter_unused_params"] = Point(
        there=_reduces_unused,
        elsewhere=_install(),
        says=installs(
            "has the group of .*", "with reduce_scatter_unused_params", "without reduce_.*"
        ),
        config=None,
    )


TABLES = {"install": INSTALL}


def go_through(table: str, odd: int) -> dict[str, str]:
    """What this rank says at each point."""
    return say_at_each(TABLES[table], odd)


@pytest.mark.parametrize("table", TABLES)
@selection("ranks,odd", [(3, -1)], [2, 3], [0, -1])
def test_when_one_rank_differs_all_raise_and_say_how(
    run: Run, table: str, ranks: int, odd: int
) -> None:
    assert_said(TABLES[table], run(ranks, go_through, table, odd), odd)
