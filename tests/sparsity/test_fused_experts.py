"""Experts that are one 3-D parameter a layer are prunable, and what is left out is said."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsdp
from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.gmp.optimizer import GMP
from qsdp.methods.sam.optimizer import SAM
from qsdp.oneshot.in_memory import compressed
from qsdp.sparsity.prunable import prunable_parameters
from tests_distributed.support.helpers import make_batch, make_model


class Experts(nn.Module):
    """Fused experts: [experts, out, in], with biases."""

    def __init__(self, width: int = 4, hidden: int = 6) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, hidden, width))
        self.up_bias = nn.Parameter(torch.randn(3, hidden))
        self.down = nn.Parameter(torch.randn(3, width, hidden))
        self.bias = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x_BC: Tensor) -> Tensor:
        x_EBF = torch.einsum("bc,efc->ebf", x_BC, self.up) + self.up_bias[:, None]
        return torch.einsum("ebf,ecf->bc", x_EBF, self.down) + self.bias.sum()


class Left(nn.Module):
    """A layer whose weight is no linear layer's."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))


def _in_blocks(*modules: nn.Module, num_blocks: int = 1) -> nn.Module:
    """A model of equal blocks, each of these modules."""
    block = nn.Module()
    for number, module in enumerate(modules):
        block.add_module(f"part{number}", module)
    model = nn.Module()
    model.blocks = nn.ModuleList([block, *(copy.deepcopy(block) for _ in range(num_blocks - 1))])
    return model


def test_fused_experts_inside_blocks_are_prunable_and_biases_are_not() -> None:
    model = _in_blocks(nn.Linear(4, 4), Experts())
    model.outside = Experts()
    assert list(prunable_parameters(model)) == [
        f"blocks.0.{name}" for name in ("part0.weight", "part1.up", "part1.down")
    ]


def test_blocks_of_fused_experts_alone_have_a_default_set() -> None:
    model = _in_blocks(Experts())
    assert list(prunable_parameters(model)) == ["blocks.0.part0.up", "blocks.0.part0.down"]


class Causal(nn.Conv1d):
    """A convolution as libraries derive it."""


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.ConvTranspose1d, Causal])
def test_the_weight_of_a_convolution_is_not_prunable(convolution: type[nn.Module]) -> None:
    model = _in_blocks(nn.Linear(4, 4), convolution(2, 4, 3))
    assert list(prunable_parameters(model)) == ["blocks.0.part0.weight"]


def test_what_an_embedding_owns_too_is_not_prunable() -> None:
    model = _in_blocks(nn.Linear(4, 4), Experts())
    model.embed = nn.Embedding(3, 4)
    model.embed.weight = model.get_parameter("blocks.0.part1.up")
    names = list(prunable_parameters(model))
    assert names == ["blocks.0.part0.weight", "blocks.0.part1.down"]


@pytest.mark.parametrize("make", [CrAM, ACDC])
@pytest.mark.parametrize("target", ["2:4", "0.5+block2"])
def test_patterns_and_blocks_of_fused_experts_are_refused_by_name(
    make: Callable[..., Any], target: str
) -> None:
    model = _in_blocks(nn.Linear(4, 4), Experts())
    options = {"sparsity": target} if make is CrAM else {"schedule": 20, "target": target}
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"blocks\.0\.part1\.up has shape \(3, 6, 4\)") as caught:
        make(model, base, **options)
    assert "\n" not in str(caught.value)


# The warning


def _said(act: Callable[[], object]) -> list[str]:
    """What is said of the prunable set meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    found = [each for each in caught if "prunable" in str(each.message)]
    assert all(issubclass(each.category, UserWarning) for each in found)
    return [str(each.message) for each in found]


def _method(name: str, model: nn.Module, prunable: list[str] | None = None) -> Any:
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    if name == "CrAM":
        return CrAM(model, base, prunable=prunable)
    if name == "ACDC":
        return ACDC(model, base, schedule=20, prunable=prunable)
    return GMP(model, base, schedule=qsdp.GMPSchedule.of(20, 0.9), prunable=prunable)


METHODS = ("CrAM", "ACDC", "GMP")


def _encoder() -> nn.Module:
    """Of each block's weights half are in_proj_weight, [24, 8], which no nn.Linear owns."""
    model = nn.Module()
    layers = [nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True) for _ in range(2)]
    model.blocks = nn.ModuleList(layers)
    return model


def _tells(message: str, name: str, percent: int) -> int:
    """Where ``message`` names parameters and their share."""
    at = message.index(name)
    share = rf"\b{percent}(\.0+)?\s?(%|per cent)"
    assert re.search(share, message), message
    return at


@pytest.mark.parametrize("method", METHODS)
def test_most_of_a_block_that_stays_out_is_named_with_its_share(method: str) -> None:
    model = _encoder()
    (message,) = _said(lambda: _method(method, model))
    _tells(message, "blocks.*.self_attn.in_proj_weight", 50)
    assert "blocks.0" not in message
    assert "\n" not in message
    assert len(_said(lambda: _method(method, model))) <= 1


def test_a_model_compressed_in_one_shot_says_what_stays_out() -> None:
    def act() -> None:
        with compressed(_encoder(), 0.5):
            pass

    assert len(_said(act)) == 1


def test_what_stays_out_is_named_by_its_share_the_largest_first() -> None:
    # 100 of 200 values in the set, then 30 and 70 that are not.
    parts = [nn.Linear(10, 10), Left(3, 10), nn.Conv2d(7, 1, (2, 5))]
    (message,) = _said(lambda: _method("CrAM", _in_blocks(*parts, num_blocks=3)))
    small = _tells(message, "blocks.*.part1.table", 15)
    large = _tells(message, "blocks.*.part2.weight", 35)
    assert large < small
    assert re.search(r"\b50(\.0+)?\s?(%|per cent)", message)
    assert "part0" not in message


@pytest.mark.parametrize(
    ("rows", "is_said"), [(9, False), (10, False), (11, True)], ids=["less", "a tenth", "more"]
)
def test_up_to_a_tenth_may_stay_out_without_a_word(rows: int, is_said: bool) -> None:
    model = _in_blocks(nn.Linear(30, 3), nn.LayerNorm(50), Left(rows, 1))
    assert bool(_said(lambda: _method("CrAM", model))) == is_said


def test_what_is_outside_of_blocks_is_no_reason_to_warn() -> None:
    model = _in_blocks(nn.Linear(4, 4), Experts())
    model.outside = Left(100, 100)
    assert _said(lambda: _method("CrAM", model)) == []


@pytest.mark.parametrize("method", METHODS)
def test_with_patterns_nothing_is_said(method: str) -> None:
    model = _encoder()

    def act() -> None:
        _method(method, model, ["blocks.*.linear1.weight"])
        SAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with compressed(model, 0.5, ["blocks.0.*weight"]):
            pass

    assert _said(act) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_step_says_nothing(method: str) -> None:
    model = _encoder()
    optimizer = _method(method, model)
    x_BTC = torch.randn(2, 3, 8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        y_BTC = x_BTC
        for block in model.get_submodule("blocks").children():
            y_BTC = block(y_BTC)
        loss = y_BTC.square().mean()
        loss.backward()
        return loss.detach()

    assert _said(lambda: [optimizer.step(closure) for _ in range(4)]) == []


def test_a_model_of_linear_layers_trains_without_a_word() -> None:
    model = make_model()
    optimizer: list[Any] = []

    def closure() -> Tensor:
        loss: Tensor = model(*make_batch(model, 0, rank=0))
        loss.backward()
        return loss.detach()

    assert _said(lambda: optimizer.append(_method("CrAM", model))) == []
    assert _said(lambda: optimizer[0].step(closure)) == []


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 12,
}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 32}),
        ("Mixtral", {"num_local_experts": 4}),
    ],
)
def test_most_of_a_mixture_of_transformers_is_in_the_default_set(
    architecture: str, options: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{architecture}Config")(**SIZES, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    chosen = prunable_parameters(model)
    inside = {n: p for n, p in model.named_parameters() if ".layers." in n and p.ndim > 1}
    assert chosen.keys() <= inside.keys()
    assert "model.layers.1.mlp.experts.gate_up_proj" in chosen
    assert "model.layers.1.mlp.gate.weight" not in chosen  # the router
    share = sum(p.numel() for p in chosen.values()) / sum(p.numel() for p in inside.values())
    assert share >= 0.9
    assert _said(lambda: _method("CrAM", model)) == []


class Scales(nn.Module):
    """Parameters of three dimensions that are no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.positions = nn.Parameter(torch.randn(1, 5, 4))
        self.bias_table = nn.Parameter(torch.randn(2, 3, 3))
        self.convolution = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
        self.other = nn.utils.parametrizations.spectral_norm(nn.Conv1d(2, 3, 2))


def test_not_all_of_three_dimensions_are_experts() -> None:
    names = list(prunable_parameters(_in_blocks(nn.Linear(4, 4), Scales())))
    assert names == ["blocks.0.part0.weight", "blocks.0.part1.attention.out_proj.weight"]
