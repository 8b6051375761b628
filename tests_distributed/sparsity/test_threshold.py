"""The threshold over shards, against the masks of one process that holds everything."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from qsdp.oneshot.in_memory import compressed
from qsdp.sparsity.masks import magnitude_masks
from qsdp.sparsity.prunable import prunable_parameters
from tests.support.cram_reference import top_k_masks
from tests_distributed.support.helpers import full_state, make_batch, make_model, shard
from tests_distributed.support.running import Run, selection

# Over 4 ranks: even, uneven with empty parts, one row, no value, a scalar per tensor, long.
SHAPES = [(8, 6), (5, 3), (1, 7), (0, 4), (1,), (301, 4)]


def _mesh(hsdp: bool) -> DeviceMesh:
    """One axis over all ranks, or two replicas of shards over the halves of the ranks."""
    world_size = dist.get_world_size()
    if hsdp:
        names = ("replicate", "shard")
        return init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=names)
    return init_device_mesh("cpu", (world_size,))


def _tensors(seed: int, num_values: int, dtype: torch.dtype) -> list[Tensor]:
    """Random tensors; few distinct values if ``num_values`` is small, so that many are tied."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [(tensor * num_values).round().div(7).to(dtype) for tensor in tensors]


def _assert_masks(tensors: list[Tensor], sparsity: float) -> None:
    """The masks of the tensors' local parts are parts of the whole tensors' masks."""
    wholes = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    total = sum(whole.numel() for whole in wholes)
    expected = top_k_masks(wholes, total - round(sparsity * total))
    masks = magnitude_masks({str(i): tensor for i, tensor in enumerate(tensors)}, sparsity)
    for mask, tensor, whole in zip(masks.values(), tensors, expected, strict=True):
        if isinstance(tensor, DTensor):
            part = distribute_tensor(whole, tensor.device_mesh, tensor.placements).to_local()
        else:
            part = whole
        assert torch.equal(mask, part)


def _distributed(seed: int, num_values: int, dtype: torch.dtype, kind: str) -> None:
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    placements: list[tuple[Placement, ...]] = [(Shard(0),)] * len(SHAPES)
    if kind == "mixed":
        placements = [(Shard(0),), (Replicate(),), (Shard(1),), (Shard(0),), (), (Shard(1),)]
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world_size // 2))
        placements = [(Replicate(), Shard(0))] * len(SHAPES)
    elif kind == "both axes":
        mesh = init_device_mesh("cpu", (2, world_size // 2))
        placements = [(Shard(0), Shard(1) if len(shape) > 1 else Shard(0)) for shape in SHAPES]
    tensors = [
        distribute_tensor(tensor, mesh, placement) if placement else tensor
        for tensor, placement in zip(_tensors(seed, num_values, dtype), placements, strict=True)
    ]
    for sparsity in (0.0, 0.31, 0.5, 0.9, 0.999):
        _assert_masks(tensors, sparsity)


def _sharded_model(hsdp: bool) -> list[bool]:
    model = shard(make_model(seed=1, tied=True), mesh=_mesh(hsdp))
    parameters = prunable_parameters(model)
    _assert_masks([parameter.detach() for parameter in parameters.values()], 0.8)
    return [parameter.to_local().numel() == 0 for parameter in parameters.values()]


def _prune_after_evaluation(reshard: bool) -> list[dict[str, Tensor]]:
    """Losses before, while and after 60 % of a model is pruned that an evaluation left gathered."""
    model = shard(make_model(seed=1), reshard=reshard)
    plain = make_model(seed=1)
    batch = make_batch(model, seed=0)
    with torch.no_grad():
        assert model(*batch) == plain(*batch)
        with compressed(model, 0.6), compressed(plain, 0.6):
            assert model(*batch) == plain(*batch)
            states = [full_state_of_shards(model)]
        assert model(*batch) == plain(*batch)
    return [*states, full_state_of_shards(model)]


def full_state_of_shards(model: torch.nn.Module) -> dict[str, Tensor]:
    """As ``full_state``, of a model that a forward pass may have left gathered."""
    prunable_parameters(model)
    return full_state(model)


def _ignored_parameters() -> None:
    """Some prunable weights are left out of the sharding: every rank has them whole."""
    model = make_model(seed=1)
    ignored = {model.get_parameter("blocks.0.qkv.weight"), model.get_parameter("norm.weight")}
    fully_shard(model, ignored_params=ignored)
    parameters = prunable_parameters(model)
    kinds = {isinstance(parameter, DTensor) for parameter in parameters.values()}
    assert kinds == {False, True}
    _assert_masks([parameter.detach() for parameter in parameters.values()], 0.6)


def _unreadable() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    partial = DTensor.from_local(torch.ones(3), mesh, [torch.distributed.tensor.Partial()])
    with pytest.raises(ValueError, match="only Shard and Replicate can be read"):
        magnitude_masks({"a": partial}, 0.5)


@selection(
    "world_size, kind, num_values",
    [
        *((1, "mixed", 4), (2, "rows", 1), (2, "mixed", 1000), (3, "rows", 4), (3, "mixed", 1)),
        *((4, "rows", 1000), (4, "mixed", 4)),
    ],
    [1, 2, 3, 4],
    ["rows", "mixed"],
    [1, 4, 1000],
)
def test_the_mask_does_not_depend_on_the_world_size(
    run: Run, world_size: int, kind: str, num_values: int
) -> None:
    seed = int(torch.randint(1 << 30, ()))
    for dtype in (torch.float32, torch.bfloat16):
        run(world_size, _distributed, seed, num_values, dtype, kind)


@pytest.mark.parametrize("kind", ["hsdp", "both axes"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_replicas_count_once_and_two_sharded_axes_are_one_tensor(
    run: Run, world_size: int, kind: str
) -> None:
    for num_values in (1, 1000):
        seed = int(torch.randint(1 << 30, ()))
        run(world_size, _distributed, seed, num_values, torch.float32, kind)


@pytest.mark.parametrize(("world_size", "hsdp"), [(2, False), (3, False), (4, False), (4, True)])
def test_masks_of_an_fsdp2_model_are_those_of_the_whole(
    run: Run, world_size: int, hsdp: bool
) -> None:
    empty = run(world_size, _sharded_model, hsdp)
    assert any(any(row) for row in empty) == (world_size == 4 and not hsdp)


def test_parameters_left_out_of_the_sharding_count_once(run: Run) -> None:
    run(3, _ignored_parameters)


@pytest.mark.parametrize("reshard", [True, False])
def test_pruning_reaches_a_model_that_evaluation_left_gathered(run: Run, reshard: bool) -> None:
    for inside, after in run(2, _prune_after_evaluation, reshard):
        torch.testing.assert_close(after, full_state(make_model(seed=1)), rtol=0, atol=0)
        assert any((value == 0).any() for value in inside.values())


def test_a_partial_sum_is_refused(run: Run) -> None:
    run(2, _unreadable)
