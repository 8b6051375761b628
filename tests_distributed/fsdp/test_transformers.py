"""Models that the transformers library shards with FSDP2 train under qsdp, or are refused by name.

transformers 5 has parallelism of its own: a DistributedConfig says over how many ranks it applies
``fully_shard``, by each architecture's plan. ``from_pretrained(folder, distributed_config=...)``
does so before it loads, for which it needs accelerate; a model made from a config goes through the
two methods that ``from_pretrained`` calls.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import qsdp
from tests_distributed.support.helpers import full_grads
from tests_distributed.support.running import Run

PRELOADED = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama")]
VOCAB, CONTEXT = 50, 12
STEPS = 4
FULL = {"weight_bits": 32, "grad_bits": 32}
CODED = {"bucket_size": 64}


def _plain(architecture: str, *, tied: bool = False) -> Any:
    """A model of the library with random weights, the same on every rank."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    if architecture == "gpt2":
        config = GPT2Config(
            n_positions=CONTEXT,
            n_embd=20,
            n_layer=2,
            n_head=2,
            **{f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")},
            **common,
        )
    else:
        config = LlamaConfig(
            hidden_size=20,
            intermediate_size=30,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=tied,
            **common,
        )
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config)


def _sharded(model: Any, **sizes: Any) -> Any:
    """``model`` sharded by the library."""
    from transformers.distributed import DistributedConfig

    kind = type(model)
    config, _, meshes = kind.prepare_distribute_model(DistributedConfig(**sizes))
    return kind.maybe_distribute_model(model, config, meshes)


def _batch() -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(VOCAB, (2, CONTEXT), generator=generator)


def _train(model: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the first step's gradients."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True
    )
    losses, grads = [], {}
    tokens = _batch()
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        torch.autograd.backward(loss)
        grads = grads or full_grads(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, grads


def _weights_in_use(model: nn.Module) -> dict[str, Tensor]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


Outcome = tuple[list[float], dict[str, Tensor]]


def _three_ways(
    options: dict[str, Any], make: Any, *args: Any
) -> tuple[Outcome, Outcome, Outcome, dict[str, Tensor], int]:
    """Stock, with the wire at 32 bits, at 8; the weights of the last, and how many groups."""
    outcomes = [_train(make(*args))]
    for config in (FULL | options, CODED | options):
        model = make(*args)
        handle = qsdp.install(model, qsdp.QSDPConfig(**config))
        outcomes.append(_train(model))
    num_groups = len({row.group for row in handle.report().rows})
    assert handle.traffic.snapshot()["reduce_sent_bytes"] > 0
    stock, full, coded = outcomes
    return stock, full, coded, _weights_in_use(model), num_groups


def _assert_alike(results: list[Any], num_groups: int) -> None:
    for stock, full, coded, _, found_groups in results:
        assert found_groups == num_groups
        torch.testing.assert_close(full[1], stock[1], rtol=1e-5, atol=1e-6)
        assert full[0] == pytest.approx(stock[0], abs=1e-3)
        assert coded[0] == pytest.approx(stock[0], abs=0.05)
        assert coded[0][0] != stock[0][0]
        assert coded[0][-1] < coded[0][0]
        for name, expected in stock[1].items():
            error = (coded[1][name] - expected).norm() / expected.norm()
            assert error < 0.1, name
    first = results[0][3]
    assert first.keys() >= results[0][0][1].keys()
    for *_, weights, _ in results[1:]:
        torch.testing.assert_close(weights, first, rtol=0, atol=0)


def _from_config(architecture: str, sizes: dict[str, Any]) -> Any:
    return _sharded(_plain(architecture), **sizes)


BLOCKS_OF_GPT2 = {"transformer.h.*": "free_full_weight"}


@pytest.mark.parametrize(
    ("architecture", "ranks", "sizes", "num_groups"),
    [
        # Embeddings, two blocks, and the last norm with the head: a module list as one group.
        ("llama", 3, {"fsdp_size": 3}, 4),
        ("llama", 4, {"fsdp_size": 2, "dp_replicate_size": 2}, 4),
        # The library has no plan for GPT-2: it becomes one group, unless one is given.
        ("gpt2", 2, {"fsdp_size": 2}, 1),
        ("gpt2", 2, {"fsdp_size": 2, "fsdp_plan": BLOCKS_OF_GPT2}, 3),
    ],
)
def test_models_sharded_by_transformers_train_as_without_qsdp(
    run: Run, architecture: str, ranks: int, sizes: dict[str, Any], num_groups: int
) -> None:
    results = run(ranks, _three_ways, {}, _from_config, architecture, sizes)
    _assert_alike(results, num_groups)


def _from_pretrained(folder: str, sizes: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()


@pytest.mark.skipif(
    find_spec("accelerate") is None,
    reason="from_pretrained(distributed_config=...) of transformers needs accelerate",
)
@pytest.mark.parametrize(
    ("tied", "num_groups"),
    [(False, 4), pytest.param(True, 3, marks=pytest.mark.heavy)],
)
def test_models_sharded_while_they_are_loaded_train_as_without_qsdp(
    run: Run, tmp_path: Path, tied: bool, num_groups: int
) -> None:
    _plain("llama", tied=tied).save_pretrained(tmp_path)
    results = run(2, _three_ways, {}, _from_pretrained, str(tmp_path), {"fsdp_size": 2})
    _assert_alike(results, num_groups)


def _loaded_after_sharding() -> Any:
    """As ``from_pretrained`` does it: parameters take the places of those that were sharded."""
    model = _plain("llama")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return model


def test_parameters_replaced_after_sharding_are_the_ones_that_travel(run: Run) -> None:
    _assert_alike(run(2, _three_ways, {}, _loaded_after_sharding), 3)


class LowRank(nn.Module):
    """A linear layer with its weight frozen and a trainable update of low rank (LoRA)."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def _adapted() -> Any:
    model = _plain("llama").requires_grad_(False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            linear = layer.self_attn.get_submodule(name)
            layer.self_attn.set_submodule(name, LowRank(linear, 3))
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("gather", ["twice", "once"])
def test_a_model_sharded_by_hand_with_frozen_weights_and_adapters_trains(
    run: Run, gather: str
) -> None:
    results = run(2, _three_ways, {"gather": gather}, _adapted)
    adapters = {
        f"model.layers.{i}.self_attn.{p}_proj.{part}.weight"
        for i in (0, 1)
        for p in "qv"
        for part in ("down", "up")
    }
    assert set(results[0][0][1]) == adapters
    _assert_alike(results, 3)


def _refusal(sizes: dict[str, Any]) -> str:
    try:
        qsdp.install(_from_config("llama", sizes))
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("ranks", "sizes", "words"),
    [
        (4, {"fsdp_size": 2, "tp_size": 2}, "embed_tokens.weight is sharded over 2 mesh dimensi"),
        (2, {"tp_size": 2}, "LlamaForCausalLM has no FSDP2 parameters: call fully_shard"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    run: Run, ranks: int, sizes: dict[str, Any], words: str
) -> None:
    for message in run(ranks, _refusal, sizes):
        assert words in message
