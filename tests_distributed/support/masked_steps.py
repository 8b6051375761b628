"""AC/DC and gradual pruning over shards, against the reference in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.gmp.optimizer import GMP
from tests.support.masked_runs import BASES, GRADUAL, SCHEDULE, acdc_reference, gmp_reference
from tests_distributed.support.helpers import (
    found_by_one,
    local_part,
    make_batch,
    make_model,
    shard,
)

NUM_MICRO = 2
NUM_STEPS = 15
"""Into a second compressed phase, and past three of the gradual prunings.
The rest of the plans is the business of one process.
"""
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "0.9": (0.9, {"sparsity": 0.9}),
    "2:4": ("2:4", {"pattern": (2, 4)}),
    "0.5+layer": ("0.5+layer", {"sparsity": 0.5, "layer": True}),
    "gmp": (None, {}),
}


def whole_mask(tensor: Tensor) -> Tensor:
    """gloo does not gather bool."""
    tensor = tensor.to(torch.uint8)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).bool()


def parts(tensor: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank has of a tensor, and the same part of the whole."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), whole.detach()
    axis = tensor.device_mesh.ndim - 1
    size, index = tensor.device_mesh.size(axis), tensor.device_mesh.get_local_rank(axis)
    return tensor.detach().to_local(), local_part(whole.detach(), size, index)


def backward(model: nn.Module, toy: Any, step: int, ranks: list[int]) -> None:
    model.zero_grad()
    for micro in range(NUM_MICRO):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(micro == NUM_MICRO - 1)
        for rank in ranks:
            batch = make_batch(toy, seed=10 * step + micro, rank=rank)
            (model(*batch) / (NUM_MICRO * len(ranks))).backward()


def compare(kind: str, variant: str, toy_options: dict[str, Any], device: str = "cpu") -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    target, keeps = VARIANTS[variant]

    def reference() -> list[tuple[list[Tensor], list[Tensor]]]:
        """Masks and parameters after each step."""
        plain = make_model(seed=3, **toy_options).to(device)
        make = gmp_reference if variant == "gmp" else acdc_reference
        masked = make(plain, BASES["sgd"], keeps, max_norm=0.5)
        found = []
        for step in range(NUM_STEPS):
            backward(plain, plain, step, list(range(world_size)))
            masked.step()
            masks = [mask.to(device, copy=True) for mask in masked.masks.values()]
            found.append((masks, [p.detach().clone() for p in plain.parameters()]))
        return found

    expected_by_step = found_by_one(reference)
    toy = make_model(seed=3, **toy_options).to(device)
    model: nn.Module = toy
    if kind == "ddp":
        model = DistributedDataParallel(toy, gradient_as_bucket_view=True)
    elif kind == "hsdp":
        names = ("replicate", "shard")
        shard(toy, mesh=init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=names))
    else:
        shard(toy, nested=world_size == 2)
    base = BASES["sgd"]([p for p in toy.parameters() if p.requires_grad])
    if variant == "gmp":
        optimizer: Any = GMP(model, base, schedule=GRADUAL, max_norm=0.5)
    else:
        optimizer = ACDC(model, base, schedule=SCHEDULE, target=target, max_norm=0.5)
    for step in range(NUM_STEPS):
        expected_masks, expected_parameters = expected_by_step[step]
        backward(model, toy, step, [rank])
        optimizer.step()
        if step % 4 == 0:
            with torch.no_grad():  # as for an accuracy: it leaves the root gathered
                model(*make_batch(toy, seed=step))
        if isinstance(toy, FSDPModule):
            toy.reshard()
        for mask, expected in zip(optimizer.masks().values(), expected_masks, strict=True):
            assert mask.dtype == torch.bool
            assert isinstance(mask, DTensor) == (kind != "ddp")
            assert torch.equal(*parts(mask, expected)), step
        for mine, theirs in zip(toy.parameters(), expected_parameters, strict=True):
            torch.testing.assert_close(*parts(mine, theirs), rtol=0, atol=1e-6)
    assert optimizer.num_steps == NUM_STEPS
