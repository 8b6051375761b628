"""The threshold of one process, against a stable sort of all magnitudes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsdp.sparsity.local_shards import local_shard
from qsdp.sparsity.threshold import global_threshold
from tests.support.cram_reference import top_k_masks

SHAPES = [(40, 25), (7,), (0, 3), (), (3, 4, 5), (300, 11)]


def _masks(tensors: list[Tensor], num_keep: int) -> list[Tensor]:
    shards = [local_shard(tensor) for tensor in tensors]
    threshold = global_threshold(shards, num_keep)
    return [threshold.keep(i, shard) for i, shard in enumerate(shards)]


def _assert_exact(tensors: list[Tensor], num_keep: int) -> None:
    masks = _masks(tensors, num_keep)
    assert sum(int(mask.sum()) for mask in masks) == num_keep
    for mask, expected in zip(masks, top_k_masks(tensors, num_keep), strict=True):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4])
def test_the_threshold_is_the_kth_largest_magnitude(dtype: torch.dtype, scale: float) -> None:
    tensors = [(torch.randn(shape) * scale).to(dtype) for shape in SHAPES]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).abs().float()
    for num_keep in [1, 2, 17, len(flat) // 2, len(flat) - 1]:
        _assert_exact(tensors, num_keep)
        keys = global_threshold([local_shard(t) for t in tensors], num_keep).keys
        assert (
            torch.tensor(keys[0], dtype=torch.int32).view(torch.float32)
            == flat.topk(num_keep).values[-1]
        )


def test_none_and_all_can_be_kept() -> None:
    tensors = [torch.randn(shape) for shape in SHAPES]
    _assert_exact(tensors, 0)
    _assert_exact(tensors, sum(tensor.numel() for tensor in tensors))
    assert _masks([], 0) == []


@pytest.mark.parametrize("num_values", [1, 2, 5])
def test_ties_are_kept_in_global_order(num_values: int) -> None:
    tensors = [torch.randint(-num_values, num_values + 1, shape).float() for shape in SHAPES]
    total = sum(tensor.numel() for tensor in tensors)
    for num_keep in torch.randint(total + 1, (12,)).tolist():
        _assert_exact(tensors, num_keep)


def test_zeros_of_either_sign_tie() -> None:
    tensors = [torch.randn(shape) for shape in SHAPES]
    for tensor in tensors:
        tensor.mul_(torch.randint(0, 2, tensor.shape))  # a negative value gives -0.0
    nonzero = sum(int(tensor.count_nonzero()) for tensor in tensors)
    for num_keep in [nonzero - 1, nonzero, nonzero + 1, nonzero + 500]:
        _assert_exact(tensors, num_keep)


def test_extreme_values_are_ranked() -> None:
    values = torch.tensor([0.0, 1e-45, 1e-40, 1.2e-38, 1.0, 3.4e38, float("inf")])
    for num_keep in range(len(values) + 1):
        _assert_exact([values, -values], num_keep)


def test_a_nan_is_kept_before_anything_else() -> None:
    values = torch.tensor([float("inf"), 1.0, float("nan"), -float("nan")])
    assert _masks([values], 2)[0].tolist() == [False, False, True, True]


def test_tensors_that_are_not_contiguous_are_read_in_their_logical_order() -> None:
    tensors = [torch.randint(-2, 3, (20, 30)).float().t(), torch.randn(6, 8)[:, ::2]]
    for num_keep in [100, 301, 500]:
        _assert_exact(tensors, num_keep)


def test_applying_a_threshold_to_what_it_pruned_keeps_the_same() -> None:
    for num_values, num_keep in [(1, 700), (3, 1500), (1000, 2000)]:
        tensors = [torch.randint(-num_values, num_values + 1, shape).float() for shape in SHAPES]
        shards = [local_shard(tensor) for tensor in tensors]
        threshold = global_threshold(shards, num_keep)
        masks = [threshold.keep(i, shard) for i, shard in enumerate(shards)]
        for mask, tensor in zip(masks, tensors, strict=True):
            tensor.masked_fill_(~mask, 0)
        for i, shard in enumerate(shards):
            assert torch.equal(threshold.keep(i, shard), masks[i])


def test_more_values_than_a_chunk_are_counted() -> None:
    _assert_exact([torch.randint(-9, 10, (700_001,)).float(), torch.randn(100)], 123_457)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot keep 5 of 4 values"):
        _masks([torch.randn(4)], 5)
    with pytest.raises(ValueError, match="float64"):
        _masks([torch.randn(4).double()], 2)
