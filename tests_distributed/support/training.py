"""A few steps of the toy model: losses, and the whole weights after them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tests_distributed.support.helpers import Toy, full_state, make_batch

State = dict[str, Tensor]


def train(
    model: Toy, steps: int = 2, first: int = 0, micro_batches: int = 1
) -> tuple[list[float], State]:
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True
    )
    losses = []
    for step in range(first, first + steps):
        for micro in range(micro_batches):
            cast(FSDPModule, model).set_requires_gradient_sync(micro == micro_batches - 1)
            loss = model(*make_batch(model, 10 * step + micro))
            loss.backward()
            losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return losses, full_state(model)


def assert_same_run(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        assert torch.equal(found[1][name], expected[1][name]), name


def assert_identical(actual: State, expected: State) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def exact_state(model: nn.Module) -> State:
    """The exact weights, also when some are left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return full_state(model)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def take_step(model: Toy, optimizer: torch.optim.Optimizer, seed: int) -> float:
    loss = model(*make_batch(model, seed))
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def train_plainly(model: Toy, steps: int) -> tuple[list[float], State]:
    optimizer = adamw(model)
    losses = [take_step(model, optimizer, step) for step in range(steps)]
    return losses, exact_state(model)
