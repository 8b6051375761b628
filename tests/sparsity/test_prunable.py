"""Which parameters are prunable, and one-shot pruning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsdp.oneshot.in_memory import compressed
from qsdp.sparsity.masks import magnitude_masks
from qsdp.sparsity.prunable import prunable_parameters
from tests_distributed.support.helpers import make_model


class Conv1D(nn.Module):
    """As in transformers: a linear layer that stores its weight as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(6))


@pytest.mark.parametrize("tied", [False, True])
def test_by_default_the_linears_inside_blocks_are_prunable(tied: bool) -> None:
    names = list(prunable_parameters(make_model(tied=tied)))
    layers = ["qkv", "out", "mlp.up", "mlp.down"]
    assert names == [f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers]


def test_a_hugging_face_linear_is_prunable_and_a_convolution_is_not() -> None:
    model = nn.Module()
    model.h = nn.ModuleList([Conv1D(), nn.Conv1d(2, 2, 1), nn.LayerNorm(4), nn.Embedding(3, 4)])
    assert list(prunable_parameters(model)) == ["h.0.weight"]


def test_a_linear_that_shares_its_weight_with_an_embedding_is_not_prunable() -> None:
    model = nn.Module()
    model.embed = nn.Embedding(5, 4)
    model.h = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 4)])
    model.h[0].weight = model.embed.weight
    assert list(prunable_parameters(model)) == ["h.1.weight"]


def test_patterns_choose_by_name_and_must_match() -> None:
    model = make_model()
    assert list(prunable_parameters(model, ["blocks.0.mlp.*.weight", "head.weight"])) == [
        "blocks.0.mlp.up.weight",
        "blocks.0.mlp.down.weight",
        "head.weight",
    ]
    with pytest.raises(ValueError, match=r"'blocks\.9\.\*' matches no parameter"):
        prunable_parameters(model, ["blocks.0.*", "blocks.9.*"])


def test_without_blocks_the_parameters_must_be_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="name the parameters"):
        prunable_parameters(model)
    assert list(prunable_parameters(model, ["0.weight"])) == ["0.weight"]


def test_a_tied_parameter_counts_once() -> None:
    a, b = torch.randn(10), torch.randn(10)
    masks = magnitude_masks({"a": a, "b": b, "again": a}, 0.5)
    assert int(masks["a"].sum() + masks["b"].sum()) == 10
    assert masks["again"] is masks["a"]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
def test_pruned_leaves_exact_zeros_and_restores_every_bit(sparsity: float) -> None:
    model = make_model(seed=7)
    weight = model.get_parameter("blocks.0.out.weight")
    with torch.no_grad():
        weight[0, :3] = torch.tensor([-0.0, float("nan"), -1e-45])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with compressed(model, sparsity) as parameters:
        total = sum(p.numel() for p in parameters.values())
        zeros = sum(int((p == 0).sum()) for p in parameters.values())
        assert abs(zeros - round(sparsity * total)) <= (1 if sparsity == 0 else 0)
        signs = torch.cat([torch.signbit(p[p == 0]) for p in parameters.values()])
        assert sparsity == 0 or not signs.any()
        for name, parameter in model.named_parameters():
            if name not in parameters:
                assert torch.equal(parameter, before[name])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32))


def test_pruned_restores_after_an_exception() -> None:
    model = make_model()
    before = model.get_parameter("blocks.1.qkv.weight").detach().clone()
    with pytest.raises(LookupError), compressed(model, 0.9):
        raise LookupError
    assert torch.equal(model.get_parameter("blocks.1.qkv.weight"), before)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.2, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"choose a fraction from 0 to below 1"):
        magnitude_masks({"a": torch.randn(3)}, sparsity)
