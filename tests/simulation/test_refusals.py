"""What cannot be simulated is refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsdp
from tests.support.simulated import Net, assert_same, batch, batches, sgd, simulation


def tied_across_groups() -> Net:
    model = Net()
    model.block[2].weight = model.embed.weight = nn.Parameter(torch.randn(12, 20))
    return model


def tied_in_one_group() -> Net:
    model = Net()
    model.out.weight = model.embed.weight
    return model


def in_double() -> Net:
    return Net().double()


def of_a_scalar() -> nn.Module:
    model = Net()
    model.gain = nn.Parameter(torch.ones(()))
    return model


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "world_size": ({"world_size": 0}, "world_size is 0"),
    "replicas": ({"replicas": 2.0}, "replicas is 2.0"),
    "ranks_per_node": ({"ranks_per_node": -1}, "ranks_per_node is -1"),
    "uneven nodes": ({"config": {"reduce": "two-hop"}, "ranks_per_node": 3}, "nodes of 3"),
    "nodes of two sizes": (
        {"config": {"ranks_per_node": 2}, "ranks_per_node": 4},
        "ranks_per_node is 4, and that of the config is 2",
    ),
    "no nodes for codes": (
        {"config": {"gather": "delta", "delta_codes": "node"}},
        "delta_codes is 'node', but 4 ranks do not fill several nodes",
    ),
    "replicas of a node": (
        {
            "config": {"gather": "delta", "delta_codes": "node", "ranks_per_node": 2},
            "world_size": 2,
            "replicas": 2,
        },
        "delta_codes is 'node', but 2 ranks do not fill several nodes",
    ),
    "a rank a node": (
        {"config": {"gather": "delta", "delta_codes": "node", "ranks_per_node": 1}},
        "of several ranks each",
    ),
    "one replica": ({"quantized_replicas": True}, "1 replicas"),
    "one rank a replica": (
        {"quantized_replicas": True, "replicas": 2, "world_size": 1},
        "2 replicas of 1 ranks",
    ),
    "param_dtype": ({"param_dtype": torch.float64}, "param_dtype is torch.float64"),
    "reduce_dtype": ({"reduce_dtype": torch.int32}, "reduce_dtype is torch.int32"),
    "policy": ({"config": {"policy": (("*.bolck.*", 4),)}}, "matches no parameter"),
    "embedding_bits": (
        {"config": {"embedding_bits": 4}, "model": lambda: nn.Linear(4, 4), "groups": []},
        "embedding_bits is 4, for embeddings and the head, of which the model has none",
    ),
    "small budget": ({"config": {"budget": 2.2}}, "the budget is 2.2 bits"),
    "small budget of gradients": (
        {"config": {"grad_budget": 2.1, "weight_bits": 3, "grad_bits": 3}},
        "the budget is 2.1 bits a value, but gradients take",
    ),
    "budget for no gradients": (
        {"config": {"grad_budget": 4, "grad_bits": 16, "embedding_bits": 8}},
        "there is nothing to allot: give grad_bits of 2 to 8",
    ),
    "budget for nothing": (
        {"config": {"budget": 4, "policy": (("*", 4),)}},
        "there is nothing to allot",
    ),
    "tied name": (
        {"model": tied_in_one_group, "groups": [], "config": {"policy": (("out.weight", 4),)}},
        "'out.weight', which is tied to 'embed.weight': use that name",
    ),
    "unknown name": ({"groups": ["bolck"]}, "'bolck'"),
    "foreign module": ({"groups": [nn.GELU()]}, "GELU"),
    "twice": ({"groups": ["block", ["block"]]}, "'block' twice"),
    "tied": ({"model": tied_across_groups}, "shared by two groups"),
    "double": ({"model": in_double}, "float64"),
    "scalar": ({"model": of_a_scalar}, "gain is a scalar"),
    "meta": ({"model": lambda: Net().to("meta")}, "on meta"),
    "no parameters": ({"model": nn.GELU, "groups": []}, "no parameters"),
    "shard_dims": ({"shard_dims": {"weight": 1}}, "'weight'"),
    "uneven columns": (
        {"shard_dims": {"out.weight": 1}, "world_size": 5},
        "dimension that 5 ranks divide",
    ),
    "no such dimension": ({"shard_dims": {"out.bias": 1}}, "gives 1 for out.bias"),
}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert re.fullmatch(r"([^.]|\.(?! ))+[^.]\.", message), f"not one sentence: {message}"
    return message


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_simulated_is_named_in_one_sentence(name: str) -> None:
    options, expected = REFUSALS[name]
    options = dict(options)
    config, make_model = options.pop("config", {}), options.pop("model", Net)
    message = refusal(lambda: simulation(config, make_model(), **options))
    assert expected in message


def test_wrong_calls_of_a_simulation_are_named_in_one_sentence() -> None:
    simulated = simulation()
    assert "4 ranks" in refusal(lambda: simulated.step(batches(0, 3)))
    assert "4 ranks" in refusal(lambda: simulated.step([]))
    assert "max_norm is 0" in refusal(lambda: simulated.step(batches(0, 4), max_norm=0))
    assert "rank is 4" in refusal(lambda: simulated.wire_bytes(rank=4))
    assert "micro_batches is 0" in refusal(lambda: simulated.wire_bytes(micro_batches=0))
    assert "bias has the shape (3,)" in refusal(lambda: simulated.copy_to(nn.Linear(2, 3)))
    assert_same(simulated.state(), dict(Net().named_parameters()))
    assert "config is a dict" in refusal(
        lambda: qsdp.simulate(Net(), {}, world_size=2, optimizer=sgd)  # type: ignore[arg-type]
    )


def test_bytes_of_changes_are_refused_before_there_are_any() -> None:
    simulated = simulation({"gather": "delta"})
    assert "take a step first" in refusal(simulated.wire_bytes)
    simulated.step(batches(0, 4))
    assert simulated.wire_bytes().gather > 0


@pytest.mark.parametrize(
    ("masks", "mistake"),
    [
        ({"block.7": torch.ones(20, 12, dtype=torch.bool)}, "'block.7', which is no parameter"),
        (
            {"out.weight": torch.ones(5, dtype=torch.bool)},
            r"shape (5,), but the parameter has (5, 12)",
        ),
        ({"out.weight": torch.ones(5, 12)}, "a Tensor of torch.float32: give a bool tensor"),
        ({"out.weight": [[True] * 12] * 5}, "a list of None: give a bool tensor"),
    ],
)
def test_masks_that_fit_no_parameter_are_refused(masks: Any, mistake: str) -> None:
    assert mistake in refusal(lambda: simulation().set_support(masks))


def test_ranks_that_use_different_parameters_stop_as_fsdp2_would() -> None:
    class Choosy(Net):
        def forward(self, tokens_BT: Tensor, use_block: bool) -> Tensor:
            x_BTC = self.embed(tokens_BT)
            return (self.block(x_BTC) if use_block else x_BTC).mean()

    data = [[[batch(rank)[0], rank != 2] for rank in range(4)]]
    with pytest.raises(RuntimeError, match=r"rank 2 .* whether block"):
        simulation({}, Choosy()).step(data)
