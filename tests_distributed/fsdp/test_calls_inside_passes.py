"""What only looks like a pass that was cut short: calls inside a pass, and calls of parts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import qsdp
from tests_distributed.support.helpers import all_ranks, full_grads
from tests_distributed.support.interruptions import LEARNED, Fault, both, fail
from tests_distributed.support.running import Run


class Recursive(nn.Module):
    """Two blocks, passed through several times by a module that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor, times: int = 0) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        x = self.head(x)
        return self(x, times - 1) if times else x

    def direct_step(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        loss: Tensor = self.head(x).square().mean()
        return loss

    def training_step(self, x: Tensor) -> Tensor:
        return self(x).square().mean()  # type: ignore[no-any-return]


def _recursive(gather: str | None, config: qsdp.QSDPConfig | None = None) -> Recursive:
    model = Recursive()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=all_ranks())
    for method in ("training_step", "direct_step"):
        register_fsdp_forward_method(model, method)
    if gather is not None:
        config = config or qsdp.QSDPConfig(weight_bits=32, grad_bits=32)
        qsdp.install(model, replace(config, gather=gather))
    return model


def _input(seed: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def calls_inside_a_pass(gather: str | None) -> list[list[Tensor]]:
    """Gradients of micro-batches through a registered method and an evaluation between them.

    Those of a root that calls itself too, where torch can do that (2.11 cannot).
    """
    model = _recursive(gather)
    for micro in range(3):
        model.set_requires_gradient_sync(micro == 2)  # type: ignore[operator]
        torch.autograd.backward(model.training_step(_input(micro)))
        with torch.no_grad():
            model(_input(9))
    model.reshard()  # type: ignore[operator]
    found = [list(full_grads(model).values())]
    model.zero_grad()
    if hasattr(model, "reset_iter_state"):
        torch.autograd.backward(model(_input(3), 2).square().mean())
        found.append(list(full_grads(model).values()))
    return found


@pytest.mark.parametrize("gather", ["twice", "once"])
def test_a_root_may_be_called_inside_its_own_pass(run: Run, gather: str) -> None:
    for stock, ours in zip(
        run(2, calls_inside_a_pass, None), run(2, calls_inside_a_pass, gather), strict=True
    ):
        torch.testing.assert_close(ours, stock)


def edit_after_a_direct_call() -> float:
    """A frozen head is set to zero after a block was called by itself."""
    model = _recursive(None).requires_grad_(False)
    model.blocks[0].requires_grad_(True)
    qsdp.install(model, qsdp.QSDPConfig(gather="once"))
    torch.autograd.backward(model(_input(0)).sum())
    with torch.no_grad():
        model.blocks[0](_input(1))
        for parameter in model.head.parameters():
            assert isinstance(parameter, DTensor)
            parameter.to_local().zero_()
        return float(model(_input(2)).abs().sum())


def test_an_edit_after_a_direct_call_of_a_block_is_seen(run: Run) -> None:
    assert run(2, edit_after_a_direct_call) == [0.0, 0.0]


def steps_of_other_optimizers() -> float:
    """One rank trains something of its own between two forward passes."""
    model = _recursive("twice")
    first = model(_input(0))
    if dist.get_rank() == 0:
        own = nn.Linear(2, 2)
        own(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(own.parameters()).step()
    torch.autograd.backward((first + model(_input(1))).sum())
    return sum(float(grad.sum()) for grad in full_grads(model).values())


def test_a_rank_may_train_something_of_its_own(run: Run) -> None:
    first, second = run(2, steps_of_other_optimizers)
    assert first == second


def registered_after_a_failed_evaluation(fails: bool) -> list[float]:
    """Steps of a registered method, of which no hook hears.

    An evaluation comes before levels are learned.
    """
    model = _recursive("twice", LEARNED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        if step == 1:
            with pytest.raises(Fault) if fails else nullcontext(), torch.no_grad():
                hook = model.blocks[1].register_forward_hook(fail) if fails else None
                try:
                    model(_input(9))
                finally:
                    if hook is not None:
                        hook.remove()
        optimizer.zero_grad()
        loss = model.direct_step(_input(step))
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_failed_evaluation_is_over_for_registered_methods_too(run: Run) -> None:
    assert run(2, both, registered_after_a_failed_evaluation) == [True, True]
