"""What is pruned and rounded, on whole models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsdp import Compression, compressed
from qsdp.common.bitmask import PackedMask
from qsdp.sparsity.masks import Prunable
from qsdp.sparsity.one_shot import BITS_GROUP, compress_, round_
from tests.support.compression_reference import kept
from tests_distributed.support.helpers import Conv1D, make_model

TARGETS: dict[str, dict[str, Any]] = {
    "0.7": {"sparsity": 0.7},
    "0.7+layer": {"sparsity": 0.7, "layer": True},
    "2:4": {"pattern": (2, 4)},
    "1:3": {"pattern": (1, 3)},
    "4:8": {"pattern": (4, 8)},
    "0.5+block4": {"sparsity": 0.5, "block": 4},
    "0.5+block4+layer": {"sparsity": 0.5, "block": 4, "layer": True},
}


class Layers(nn.Module):
    """Linear layers of both layouts, their inputs multiples of 24."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(24, 5), Conv1D(24, 7), nn.Linear(72, 1), Conv1D(48, 3)]
        self.blocks = nn.ModuleList(layers)


def _layers(num_values: int | None = None) -> Layers:
    """Random weights; with ``num_values``, few distinct ones, so that many are tied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Layers()
        for parameter in model.parameters():
            parameter.data.normal_()
            if num_values is not None:
                parameter.data.mul_(num_values).round_().div_(8)
    return model


def _compress(model: nn.Module, target: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Before and after, and the masks."""
    prunable = Prunable.of(model)
    before = [parameter.detach().clone() for parameter in prunable.parameters]
    packed = compress_(prunable.shards(), Compression.of(target), prunable.dims)
    after = [parameter.detach() for parameter in prunable.parameters]
    return before, after, [mask.unpack() for mask in packed]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_values", [None, 1, 4])
def test_what_is_kept_is_what_the_target_says(target: str, num_values: int | None) -> None:
    before, after, masks = _compress(_layers(num_values), target)
    expected = kept(before, [1, 0, 1, 0], **TARGETS[target])
    if "block" in target and num_values is not None:  # which of equal blocks stay is not said
        assert sum(m.sum() for m in masks) == sum(m.sum() for m in expected)
    else:
        for mask, mask_expected in zip(masks, expected, strict=True):
            assert torch.equal(mask, mask_expected)
    for value, whole, mask in zip(after, before, masks, strict=True):
        assert torch.equal(value.view(torch.int32), torch.where(mask, whole, 0).view(torch.int32))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_every_layer_loses_the_same_share_exactly(sparsity: float) -> None:
    _, _, masks = _compress(_layers(num_values=1), f"{sparsity}+layer")
    for mask in masks:
        assert mask.sum() == mask.numel() - round(sparsity * mask.numel())


def test_of_equal_magnitudes_the_first_stay() -> None:
    for layer, dim in ((nn.Linear(8, 2), 1), (Conv1D(8, 2), 0)):
        model = nn.Module()
        model.blocks = nn.ModuleList([layer])
        with torch.no_grad():
            layer.weight.fill_(-1.0)
        _, _, (mask,) = _compress(model, "3:4")
        line = torch.tensor([1, 1, 1, 0] * 2).bool()
        assert all(torch.equal(row, line) for row in mask.unbind(1 - dim))


@pytest.mark.parametrize("shape", [(3, 300), (2, 3, 130), (128,), (1, 1), (0, 4), (4, 0), ()])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_has_few_levels_and_every_value_the_nearest(
    shape: tuple[int, ...], bits: int, dtype: torch.dtype
) -> None:
    before = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.where(before.abs() < 0.1, 0.0, before)
    after = before.clone()
    round_(after, bits)
    if not shape or not before.numel():
        assert torch.equal(after, before)
        return
    assert not after[before == 0].any()
    assert not torch.signbit(after[after == 0]).any()
    largest = 2 ** (bits - 1) - 1
    groups = zip(before.split(BITS_GROUP, -1), after.split(BITS_GROUP, -1), strict=True)
    slack = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    for old, new in groups:
        rows = zip(old.reshape(-1, old.shape[-1]), new.reshape(-1, new.shape[-1]), strict=True)
        for values, rounded in rows:
            scale = values.double().abs().max() / largest
            levels = scale * torch.arange(-largest, largest + 1)
            assert len(rounded.unique()) <= 2**bits - 1
            nearest = (values.double()[:, None] - levels).abs().min(1).values
            error = (values.double() - rounded.double()).abs()
            assert (error <= nearest + slack * values.double().abs().max()).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_and_smallest_floats_stay_finite(bits: int) -> None:
    for extreme in (torch.finfo(torch.float32).max, 1e-45, 1e-38):
        values = torch.tensor([extreme, -extreme, 0.0, extreme / 3])
        round_(values, bits)
        assert values.isfinite().all()
        assert values.abs().max() <= extreme * (1 + 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_shows_in_its_group_and_in_no_other(bad: float) -> None:
    values = torch.ones(2, 2 * BITS_GROUP)
    values[1, BITS_GROUP + 5] = bad
    values[1, BITS_GROUP + 6] = 0.0
    round_(values, 4)
    is_bad = torch.zeros_like(values, dtype=torch.bool)
    is_bad[1, BITS_GROUP:] = True
    assert torch.equal(values.isnan(), is_bad)
    assert torch.equal(values[~is_bad], torch.ones(3 * BITS_GROUP))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (8,), (3, 5), (0, 4), (2, 3, 7)])
def test_a_packed_mask_is_unpacked_as_it_was(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = PackedMask.of(mask)
    assert packed.bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(packed.unpack(), mask)
    assert torch.equal(PackedMask.of(mask.unsqueeze(0).mT.mT).unpack()[0], mask) if shape else True


@pytest.mark.parametrize("target", ["0.5", "2:4+4bit", "0.5+block4", "3bit", "0.7+layer"])
@pytest.mark.parametrize("raises", [False, True])
def test_after_the_context_every_bit_is_as_before(target: str, raises: bool) -> None:
    model = _layers()
    with torch.no_grad():
        model.blocks[0].weight[0, :3] = torch.tensor([-0.0, -1e-45, 7.0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        with compressed(model, target) as parameters:
            assert list(parameters) == [f"blocks.{i}.weight" for i in range(4)]
            assert not any(torch.equal(p, before[name]) for name, p in parameters.items())
            if raises:
                raise LookupError
    except LookupError:
        assert raises
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32))


@pytest.mark.parametrize(
    ("target", "patterns", "message"),
    [
        ("2:4", None, r"blocks\.0\.qkv\.weight has shape \(30, 10\).* 2:4 cannot .* groups of 4"),
        ("0.5+block3", None, r"blocks\.0\.qkv\.weight has shape \(30, 10\)"),
        ("1:5", ["*.up.weight", "norm.weight"], r"norm\.weight has shape \(10,\)"),
    ],
)
def test_what_cannot_be_cut_into_groups_is_refused_by_name(
    target: str, patterns: list[str] | None, message: str
) -> None:
    model = make_model()
    before = model.blocks[0].qkv.weight.detach().clone()
    with pytest.raises(ValueError, match=message), compressed(model, target, patterns):
        pass
    assert torch.equal(model.blocks[0].qkv.weight, before)
