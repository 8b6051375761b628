"""Every method over a small model, how it is trained, and what becomes of it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.gmp.optimizer import GMP
from qsdp.methods.gmp.schedule import GMPSchedule
from qsdp.methods.sam.optimizer import SAM
from tests_distributed.support.helpers import Toy, make_batch

NUM_STEPS = 4
PHASES = ACDCSchedule(steps=NUM_STEPS, warmup=1, phase=1, last_dense=1, last_sparse=1)
GROWTH = GMPSchedule(steps=NUM_STEPS, start=1, end=3, every=1, initial=0.2, sparsity=0.6)
METHODS: dict[str, Any] = {
    "CrAM+": lambda m, base: CrAM(m, base, sparsity=(0.3, 0.6)),
    "CrAM": lambda m, base: CrAM(m, base, sparsity=(0.3, 0.6), plus=False),
    "SAM": SAM,
    "ACDC": lambda m, base: ACDC(m, base, schedule=PHASES, target=0.5),
    "GMP": lambda m, base: GMP(m, base, schedule=GROWTH),
}
TWO_PASSES = ("CrAM+", "CrAM", "SAM")
MASKED = ("ACDC", "GMP")
of_every_method = pytest.mark.parametrize("method", list(METHODS))

# Masks are renewed after steps 1 and 5; AC/DC lifts them after step 3.
WEIGHT = "blocks.0.out.weight"
RARELY_RENEWED: dict[str, Any] = {
    "ACDC": lambda m, base: ACDC(
        m,
        base,
        schedule=ACDCSchedule(steps=9, warmup=1, phase=2, last_dense=0, last_sparse=2),
        target=0.5,
    ),
    "GMP": lambda m, base: GMP(
        m,
        base,
        schedule=GMPSchedule(steps=9, start=1, every=4, end=5, initial=0.3, sparsity=0.6),
    ),
}


def said(work: Callable[[], object]) -> str:
    """What refuses ``work``."""
    try:
        work()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def bits(tensor: Tensor | None) -> Any:
    """What two tensors have in common that are the same bit for bit."""
    if tensor is None:
        return None
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def all_bits(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def weights(model: nn.Module) -> dict[str, Any]:
    return all_bits(dict(model.named_parameters()))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)


def closure_of(
    called: Callable[..., Tensor], toy: Toy, step: int, rank: int | None = 0
) -> Callable[[], float]:
    """One forward and backward pass of ``toy``, or of what holds it."""

    def closure() -> float:
        loss = called(*make_batch(toy, step, rank))
        loss.backward()
        return loss.item()

    return closure


def train(
    optimizer: Any,
    called: Callable[..., Tensor],
    toy: Toy,
    steps: range = range(NUM_STEPS),
    rank: int | None = 0,
) -> list[Any]:
    """Losses, and what is pruned after each step."""
    found = []
    for step in steps:
        optimizer.zero_grad()
        found.append((optimizer.step(closure_of(called, toy, step, rank)), optimizer.pruned))
    optimizer.zero_grad()
    return found


def hand_over(optimizer: Any, model: nn.Module, *, in_place: bool = True) -> None:
    """Put the model's parameters where the optimizer, made of all of them, has its own."""
    (group,) = optimizer.param_groups
    if in_place:
        for i, parameter in enumerate(model.parameters()):
            group["params"][i] = parameter
    else:
        group["params"] = list(model.parameters())


class Holder(nn.Module):
    """Holds a model, as a library's wrapper does."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, *batch: Tensor) -> Any:
        return self.held(*batch)


def with_blocks(model: Any, wrap: Callable[[Any], Any]) -> Any:
    """``model``, whose blocks are wrapped in place."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrap(block)
    return model


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def share_due(optimizer: Any) -> float:
    """What the masks of one of ``RARELY_RENEWED`` are to prune now."""
    if isinstance(optimizer, GMP):
        return optimizer.schedule.sparsity_at(optimizer.num_steps)
    return 0.5 if optimizer.schedule.is_compressed(optimizer.num_steps) else 0.0


def assert_masked(share: float, masks: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """``share`` of all of ``trained`` together is zero, and the masks say so (whole tensors)."""
    assert set(masks) == set(trained)
    num_zeros = 0
    for name, weight in trained.items():
        assert torch.equal(weight == 0, ~masks[name])
        num_zeros += int((weight == 0).sum())
    assert share > 0
    assert num_zeros == round(share * sum(w.numel() for w in trained.values()))
