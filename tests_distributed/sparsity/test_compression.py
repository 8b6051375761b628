"""Masks and values over shards, against those of one process that holds everything."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from qsdp import Compression, compressed
from qsdp.sparsity.masks import Prunable, keep_masks
from tests_distributed.support.helpers import Conv1D, local_part
from tests_distributed.support.running import Run

TARGETS = ["0.7", "0.7+layer", "2:4", "4:8", "0.5+block4", "2:4+4bit", "0.5+4bit"]


class Layers(nn.Module):
    """Few rows and many, of both layouts; the inputs are the least multiples of a group's size.

    Over 3 ranks a Conv1D of 8 inputs is cut into 3, 3 and 2, one of 4 into 2, 2 and 0.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        shapes = [(size, 1), (size, 6), (2 * size, 2), (3 * size, 5), (5 * size, 3)]
        linears: list[nn.Module] = [nn.Linear(*shape) for shape in shapes]
        self.blocks = nn.ModuleList([*linears, *(Conv1D(*shape) for shape in shapes)])


def _layers(size: int, num_values: int, dtype: torch.dtype) -> Layers:
    torch.manual_seed(size)
    model = Layers(size)
    for parameter in model.parameters():
        parameter.data.normal_().mul_(num_values).round_().div_(7)
    return model.to(dtype)


def _compare(kind: str, dtype: torch.dtype, dim: int = 0, targets: list[str] = TARGETS) -> None:
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    if kind == "hsdp":
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=names)
    place = (mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1))
    for target in map(Compression.of, targets):
        size = max(4, target.group_size)
        for num_values in (3, 100_000):
            plain, model = (_layers(size, num_values, dtype) for _ in range(2))
            if dim:
                del plain.blocks[5:], model.blocks[5:]
            fully_shard(
                model,
                mesh=mesh,
                shard_placement_fn=lambda p: Shard(min(dim, p.ndim - 1)),
            )
            expected, prunable = Prunable.of(plain), Prunable.of(model)
            prunable.check(target)
            wholes = keep_masks(expected.shards(), target, expected.dims)
            masks = keep_masks(prunable.shards(), target, prunable.dims)
            for name, mask, whole in zip(prunable.names, masks, wholes, strict=True):
                assert torch.equal(mask, local_part(whole, *place, dim)), (name, target)
            if target.bits is None:  # the masks say all
                continue
            with compressed(plain, target) as values, compressed(model, target) as parts:
                for name, part in parts.items():
                    assert isinstance(part, DTensor)
                    local = local_part(values[name], *place, dim)
                    bits = torch.int32 if dtype == torch.float32 else torch.int16
                    assert torch.equal(part.to_local().view(bits), local.view(bits)), (
                        name,
                        target,
                    )


def _by_columns(parameter: nn.Parameter) -> Shard:
    """FSDP2 cuts columns evenly or not at all."""
    is_even = parameter.ndim == 2 and parameter.shape[1] % dist.get_world_size() == 0
    return Shard(1 if is_even else 0)


def _columns() -> None:
    """FSDP2 cuts the input dimension of nn.Linear, inside of groups."""
    _compare("fsdp", torch.float32, 1, ["2:4", "4:8", "0.5+block4", "0.7+layer"])
    model = Layers(8)
    fully_shard(model, shard_placement_fn=_by_columns)
    with (
        pytest.raises(ValueError, match=r"blocks\.0\.weight is sharded by its last dimension"),
        compressed(model, "2:4+4bit"),
    ):
        pass


def _two_axes() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(8, 4)])
    weight = torch.distributed.tensor.distribute_tensor(
        model.blocks[0].weight.detach(), mesh, [Shard(0), Shard(1)]
    )
    model.blocks[0].weight = nn.Parameter(weight)
    with (
        pytest.raises(ValueError, match=r"blocks\.0\.weight is sharded over 2 mesh axes, but 2:4"),
        compressed(model, "2:4"),
    ):
        pass


@pytest.mark.parametrize(
    ("world_size", "kind", "dtype"),
    [
        (2, "fsdp", torch.float32),
        (3, "fsdp", torch.float32),
        pytest.param(4, "fsdp", torch.float32, marks=pytest.mark.heavy),
        pytest.param(4, "hsdp", torch.float32, marks=pytest.mark.heavy),
        pytest.param(3, "fsdp", torch.bfloat16, marks=pytest.mark.heavy),
        (4, "hsdp", torch.bfloat16),
    ],
    ids=str,
)
def test_what_is_kept_does_not_depend_on_the_ranks(
    run: Run, world_size: int, kind: str, dtype: torch.dtype
) -> None:
    run(world_size, _compare, kind, dtype)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_linear_cut_by_columns_keeps_the_same(run: Run, world_size: int) -> None:
    run(world_size, _columns)


def test_patterns_over_two_sharded_axes_are_refused(run: Run) -> None:
    run(4, _two_axes)
