"""Ranks that disagree at ``qsdp.install`` stop there, and each names the difference."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import qsdp
from tests_distributed.support.helpers import make_model, shard
from tests_distributed.support.pool import GLOO_TIMEOUT_S
from tests_distributed.support.running import Run

Odd = tuple[dict[str, Any], Callable[[], nn.Module], str, str, str]


def _toy() -> nn.Module:
    return shard(make_model())


def _with_a_frozen_weight() -> nn.Module:
    model = make_model()
    model.blocks[1].mlp.up.weight.requires_grad_(False)
    return shard(model)


def _with_a_layer_less() -> nn.Module:
    return shard(make_model(num_layers=1))


def _with_another_shape() -> nn.Module:
    return shard(make_model(hidden=6))


def _with_fewer_groups() -> nn.Module:
    return shard(make_model(), nested=False)


def _with_one_group() -> nn.Module:
    return fully_shard(make_model(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def _kept_gathered() -> nn.Module:
    return shard(make_model(), reshard=False)


# The config and the model of one rank, what is said to differ, and how: there, and on the others.
ODD: list[Odd] = [
    ({"weight_bits": 4}, _toy, "qsdp with weight_bits", "4", "8"),
    ({"grad_bits": 3}, _toy, "qsdp with grad_bits", "3", "8"),
    ({"embedding_bits": 6}, _toy, "qsdp with embedding_bits", "6", "None"),
    ({"seed": 12}, _toy, "qsdp with seed", "12", "0"),
    ({"bucket_size": 64}, _toy, "qsdp with bucket_size", "64", "None"),
    ({"rounding": "dither"}, _toy, "qsdp with rounding", "'dither'", "None"),
    ({"gather": "once"}, _toy, "qsdp with gather", "'once'", "'twice'"),
    ({"warmup_steps": 5}, _toy, "qsdp with warmup_steps", "5", "0"),
    ({"policy": (("*.up.weight", 4),)}, _toy, "with policy", "(('*.up.weight', 4),)", "()"),
    ({}, _with_a_frozen_weight, "has blocks.1.mlp.up.weight", "frozen", "trainable"),
    ({}, _with_another_shape, "has blocks.0.mlp.up.weight", "of shape 6x10", "of shape 5x10"),
    ({}, _with_fewer_groups, "the group of blocks.0.norm1.weight", "12 others", "7 others"),
    ({}, _with_one_group, "the group of embed.weight", "30 others", "4 others"),
    ({}, _kept_gathered, "the group of", "gathered until", "resharded after"),
]


def _expected(case: Odd, odd: int) -> str:
    """What every rank is to say."""
    _, _, about, there, elsewhere = case
    values = [there, elsewhere] if odd else [elsewhere, there]
    first, second = map(re.escape, values)
    return rf"rank {odd or 1} .*{re.escape(about)}.* {first}.* but rank 0 .*{second}.*every rank"


def _install_all_apart(odd: int) -> list[str]:
    return [_install_apart(odd, config, build) for config, build, *_ in ODD]


def _install_apart(odd: int, config: dict[str, Any], build: Callable[[], nn.Module]) -> str:
    is_odd = dist.get_rank() == odd
    model = build() if is_odd else _toy()
    try:
        qsdp.install(model, qsdp.QSDPConfig(**(config if is_odd else {})))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "installed"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_disagree_stop_at_install_and_each_names_the_difference(
    run: Run, ranks: int
) -> None:
    odd = random.randrange(ranks)
    for messages in run(ranks, _install_all_apart, odd):
        for case, message in zip(ODD, messages, strict=True):
            assert re.match(_expected(case, odd), message), message


def test_a_rank_that_lacks_a_layer_is_named(run: Run) -> None:
    odd = random.randrange(3)
    for message in run(3, _install_apart, odd, {}, _with_a_layer_less):
        layer = "blocks.1.norm1.weight, blocks.1.norm1.bias, blocks.1.qkv.weight and 10 more"
        assert f"rank {odd} does not shard {layer} but rank {0 if odd else 1} does" in message


def test_a_mistake_of_one_rank_stops_all(run: Run) -> None:
    odd = random.randrange(3)
    config = {"policy": (("*.no_such", 4),)}
    messages = run(3, _install_apart, odd, config, _toy)
    mistake = messages.pop(odd)
    assert mistake.startswith("the policy pattern '*.no_such' matches no parameter")
    for message in messages:
        assert message.startswith(f"rank {odd} cannot install qsdp ({mistake[:-1]}): give every")


def _install_apart_on_replicas(odd: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    said = "installed"
    try:
        bits = 3 if dist.get_rank() == odd else 5
        qsdp.install(shard(make_model(), mesh=mesh), qsdp.QSDPConfig(weight_bits=bits))
    except RuntimeError as error:
        said = str(error)
    qsdp.install(shard(make_model(), mesh=mesh))
    return said


def test_replicas_that_disagree_stop_too_and_may_then_agree(run: Run) -> None:
    odd = random.randrange(4)
    bits = (3, 5) if odd else (5, 3)
    for said in run(4, _install_apart_on_replicas, odd):
        expected = f"rank {odd or 1} installs qsdp with weight_bits {bits[0]} but rank 0 with"
        assert said.startswith(f"{expected} {bits[1]}:")


def _install_with_arguments_apart(odd: int, what: str) -> tuple[str, float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    rank = dist.get_rank()
    own: dict[str, Any] = {"replicate_mesh": mesh["replicate"]}
    odds: dict[str, Any] = {
        "replicate_mesh": {},
        "replicate_mesh of two dimensions": {"replicate_mesh": mesh},
        "node_mesh": {},
        "config": own | {"config": {"weight_bits": 4}},
    }
    if what == "node_mesh":
        own = {"node_mesh": mesh}
    model = shard(make_model(), mesh=None if what == "node_mesh" else mesh["shard"])
    started, said = time.monotonic(), "not called"
    # Only a replica that agrees on its meshes talks to the other, which is left out here: it would
    # wait until this one's processes end.
    if what in ("node_mesh", "config") or rank // 2 == odd // 2:
        try:
            qsdp.install(model, **(odds[what] if rank == odd else own))
        except (RuntimeError, ValueError) as error:
            said = str(error)
    return said, time.monotonic() - started


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("replicate_mesh", r"rank \d installs qsdp with replicate_mesh (None|\(2,\)) but rank \d "),
        ("replicate_mesh of two dimensions", "replicate_mesh has 2 dimensions: give a 1-D mesh"),
        ("node_mesh", r"rank \d installs qsdp with node_mesh (None|\(2, 2\)) but rank \d "),
        ("config", "config is a dict: give a qsdp.QSDPConfig"),
    ],
)
def test_arguments_of_install_that_differ_are_named_at_once(run: Run, what: str, said: str) -> None:
    odd = random.randrange(4)
    for rank, (message, seconds) in enumerate(run(4, _install_with_arguments_apart, odd, what)):
        assert seconds < GLOO_TIMEOUT_S / 2
        if message != "not called":
            assert re.search(said, message), message
            is_mistake = what in ("config", "replicate_mesh of two dimensions")
            begins = f"rank {odd} cannot install qsdp (" if is_mistake and rank != odd else ""
            assert message.startswith(begins)
