"""CrAM over shards, against the same steps in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from qsdp.methods.cram.optimizer import CrAM
from tests_distributed.support.helpers import (
    Toy,
    found_by_one,
    full_of_all,
    make_batch,
    make_model,
    shard,
)

NUM_STEPS = 3
NUM_MICRO = 2


def mesh_over(hsdp: bool) -> DeviceMesh:
    """One axis over all ranks, or two replicas of shards over the halves of the ranks."""
    world_size = dist.get_world_size()
    if hsdp:
        names = ("replicate", "shard")
        return init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=names)
    return init_device_mesh("cpu", (world_size,))


def full_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(full_of_all(dict(enumerate(tensors))).values())


class Recorder(torch.optim.SGD):
    """SGD that keeps the whole gradients of every step."""

    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        super().__init__(parameters, lr=lr, momentum=0.9, foreach=True)
        self.grads: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.grads.append(full_tensors([p.grad for p in parameters if p.grad is not None]))
        return super().step(closure)


def train_cram(
    model: nn.Module, toy: Toy, ranks: list[int], zeros: list[list[Tensor]] | None, **options: Any
) -> tuple[CrAM, Recorder]:
    """Take CrAM steps on the batches of ``ranks``, in micro-batches; note each pass's zeros."""
    base = Recorder(model)
    optimizer = CrAM(model, base, seed=5, **options)

    def closure_of(step: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            if zeros is not None:
                zeros.append([p == 0 for p in full_tensors(optimizer.prunable.parameters)])
            total = torch.zeros((), device=next(toy.parameters()).device)
            for micro in range(NUM_MICRO):
                if isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(micro == NUM_MICRO - 1)
                for rank in ranks:
                    batch = make_batch(toy, seed=10 * step + micro, rank=rank)
                    loss = model(*batch) / (NUM_MICRO * len(ranks))
                    loss.backward()
                    total += loss.detach()
            with torch.no_grad():  # as for an accuracy: it leaves the root gathered
                model(*make_batch(toy, seed=step))
            return total

        return closure

    for step in range(NUM_STEPS):
        optimizer.step(closure_of(step))
    return optimizer, base


def compare_with_one_process(
    kind: str,
    toy_options: dict[str, Any],
    reshard: bool,
    options: dict[str, Any],
    device: str = "cpu",
) -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()

    def reference() -> tuple[list[list[Tensor]], list[list[Tensor]], int, float | None]:
        plain = make_model(seed=3, **toy_options).to(device)
        zeros: list[list[Tensor]] = []
        optimizer, base = train_cram(plain, plain, list(range(world_size)), zeros, **options)
        return zeros, base.grads, optimizer.skipped_steps, optimizer.last_grad_norm

    expected_zeros, expected_grads_by_step, skipped_steps, norm = found_by_one(reference)
    toy = make_model(seed=3, **toy_options).to(device)
    model: nn.Module = toy
    zeros: list[list[Tensor]] = []
    if kind.startswith("ddp"):
        # Of a bucket that holds one parameter the gradient is all.
        bucket_mb = 1e-6 if kind == "ddp, a bucket a parameter" else 25
        model = DistributedDataParallel(toy, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)
    elif kind == "hsdp":
        shard(toy, reshard=reshard, mesh=mesh_over(hsdp=True))
    else:
        shard(toy, reshard=reshard, nested=world_size == 2)
    optimizer, base = train_cram(model, toy, [rank], zeros, **options)

    assert optimizer.skipped_steps == skipped_steps == 0
    assert len(zeros) == len(expected_zeros) == 2 * NUM_STEPS
    for masks, expected_masks in zip(zeros, expected_zeros, strict=True):
        for mask, expected_mask in zip(masks, expected_masks, strict=True):
            assert torch.equal(mask, expected_mask)
    for grads, expected_grads in zip(base.grads, expected_grads_by_step, strict=True):
        torch.testing.assert_close(grads, expected_grads, rtol=0, atol=1e-6)
    assert optimizer.last_grad_norm == pytest.approx(norm, abs=1e-6)
