"""What a second pass may leave behind.

There is a model with buffers of every kind, and trainings by two optimizers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.sam.optimizer import SAM
from tests.support.cram_reference import top_k_masks
from tests.support.optimizers import MASKED, METHODS, all_bits, bits
from tests_distributed.support.helpers import Toy, make_batch

WIDTH = 6
NUM_CLASSES = 3


class Layer(nn.Module):
    """A linear layer and a buffer of every kind, each of which a pass changes."""

    count: Tensor
    kept: Tensor
    assigned: Tensor
    alternating: Tensor
    late: Tensor | None
    fleeting: Tensor | None
    turned: Tensor
    widened: Tensor | None
    shared: Tensor

    def __init__(self, shared: Tensor, has_widened: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("kept", torch.zeros(WIDTH))
        self.register_buffer("assigned", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("alternating", torch.zeros(WIDTH))
        self.register_buffer("late", None)
        self.register_buffer("fleeting", None)
        self.register_buffer("turned", torch.zeros(2, WIDTH).t())
        self.register_buffer("widened", torch.zeros(1).expand(WIDTH) if has_widened else None)
        self.register_buffer("shared", shared)

    def forward(self, x_BC: Tensor) -> Tensor:
        y_BC = self.linear(x_BC)
        with torch.no_grad():
            mean_C = y_BC.mean(0)
            self.count += 1
            self.kept.mul_(0.5).add_(mean_C)
            self.assigned = 0.5 * self.assigned + mean_C
            self.turned[:, 1] += mean_C
            self.shared += mean_C
            if self.widened is not None:
                self.widened = (self.widened[0] + mean_C.sum()).expand(WIDTH)
            self.late = mean_C if self.late is None else self.late + mean_C
            if self.count % 2:
                self.alternating += mean_C
                self.fleeting = None
            else:
                self.alternating = self.alternating + 2 * mean_C
                self.fleeting = mean_C
        return x_BC + torch.relu(self.norm(y_BC))


class Net(nn.Module):
    """Two such layers, which share a buffer, and a head."""

    def __init__(self, has_widened: bool) -> None:
        super().__init__()
        shared = torch.zeros(WIDTH)
        self.blocks = nn.ModuleList(Layer(shared, has_widened) for _ in range(2))
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x_BC: Tensor, targets_B: Tensor) -> Tensor:
        for block in self.blocks:
            x_BC = block(x_BC)
        return F.cross_entropy(self.head(x_BC), targets_B)


def make_net(has_widened: bool = True) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net(has_widened)


def net_batch(seed: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    x_BC = torch.randn(5, WIDTH, generator=generator)
    return x_BC, torch.randint(NUM_CLASSES, (5,), generator=generator)


def net_closure(called: Callable[..., Tensor], step: int, rank: int = 0) -> Callable[[], float]:
    def closure() -> float:
        loss = called(*net_batch(step, rank))
        loss.backward()
        return loss.item()

    return closure


def buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """Those that are None and those that modules share included."""
    return {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
    }


def split(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trained matrices of the blocks, and what else is trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {n: p for n, p in trained.items() if n.startswith("blocks.") and p.ndim == 2}
    return hidden, {n: p for n, p in trained.items() if n not in hidden}


def made(method: str, model: nn.Module, base: torch.optim.Optimizer) -> Any:
    """An optimizer that may warn of what its base lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return METHODS[method](model, base)


def local(tensor: Any) -> Any:
    """This rank's part of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def grads(parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    return all_bits({name: local(p.grad) for name, p in parameters.items()})


def everything(model: nn.Module, base: torch.optim.Optimizer) -> dict[str, Any]:
    """Bits of weights, gradients, buffers and moments (this rank's)."""
    parameters = dict(model.named_parameters())
    return {
        "weights": all_bits({name: local(p) for name, p in parameters.items()}),
        "gradients": grads(parameters),
        "buffers": all_bits(buffers(model)),
        "moments": [
            (key, bits(local(value)))
            for p in parameters.values()
            for key, value in base.state.get(p, {}).items()
            if isinstance(value, Tensor)
        ],
    }


# --- steps that were skipped or cut short --------------------------------------------------------


class Steps:
    """Of a model of which one optimizer trains the matrices and another the rest."""

    method: str
    model: Any
    rest: dict[str, nn.Parameter]
    optimizer: Any
    other: torch.optim.Optimizer
    losses: list[float]

    def run_pass(self, step: int, num_micro: int | None = None) -> float:
        """Forward and backward; returns the loss."""
        raise NotImplementedError

    def prepare(self, step: int) -> None:
        """What is there when a step begins: gradients of an earlier micro-batch."""
        if self.method in MASKED:
            self.run_pass(100 + step, 1)
        else:
            for parameter in self.rest.values():
                parameter.grad = 0.1 * parameter.detach()

    def take(self, step: int, fault: Callable[[int, str], Any] = lambda _, __: None) -> None:
        """Take a step, which calls ``fault`` with the number of the pass and the place.

        What ``fault`` returns at the end of a pass takes the loss's place.
        """
        count = 0

        def on_forward(_: Any, __: Any) -> None:
            fault(count, "forward")

        def on_backward(_: Any, __: Any, output: Tensor) -> None:
            output.register_hook(lambda _: fault(count, "backward"))

        def closure() -> float:
            nonlocal count
            count += 1
            loss = self.run_pass(step)
            other = fault(count, "end")
            return loss if other is None else other

        handles = [
            self.model.blocks[1].register_forward_pre_hook(on_forward),
            self.model.blocks[0].register_forward_hook(on_backward),
        ]
        try:
            self.losses.append(self.optimizer.step(closure))
        finally:
            for handle in handles:
                handle.remove()

    def end(self) -> None:
        """The other optimizer's part of a step."""
        self.other.step()
        self.model.zero_grad()


def failing(in_pass: int, where: str) -> Callable[[int, str], None]:
    def fault(count: int, place: str) -> None:
        if (count, place) == (in_pass, where):
            raise LookupError("on purpose")

    return fault


# --- two optimizers, against what they do written plainly ----------------------------------------

RHO, LR, OTHER_LR, SPARSITY = 0.05, 0.1, 0.05, 0.6
NUM_STEPS = 3
PAIRS: dict[str, dict[str, Any]] = {
    "CrAM+": {"plus": True, "prunes": True, "normalize": False},
    "CrAM": {"plus": False, "prunes": True, "normalize": False},
    "SAM": {"plus": False, "prunes": False, "normalize": True},
}


def train_plainly(
    model: Toy, ranks: Sequence[int], *, plus: bool, prunes: bool, normalize: bool
) -> None:
    """CrAM or SAM over the blocks' matrices, SGD over the rest."""
    hidden, rest = (list(part.values()) for part in split(model))
    matrices = {
        n: p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2
    }
    prunable = list(matrices.values())  # frozen ones, too

    def gradients(step: int) -> tuple[list[Tensor], list[Tensor]]:
        losses = [model(*make_batch(model, step, rank)) for rank in ranks]
        found = torch.autograd.grad(sum(losses) / len(ranks), [*hidden, *rest])
        return list(found[: len(hidden)]), list(found[len(hidden) :])

    for step in range(NUM_STEPS):
        first, others = gradients(step)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in first))
        before = [p.detach().clone() for p in [*hidden, *prunable]]
        with torch.no_grad():
            for parameter, grad in zip(hidden, first, strict=True):
                parameter.add_(RHO * grad / (norm if normalize else 1))
            total = sum(p.numel() for p in prunable)
            num_keep = total - round(SPARSITY * total) if prunes else total
            masks = dict(
                zip(prunable, top_k_masks([p.detach() for p in prunable], num_keep), strict=True)
            )
            for parameter, mask in masks.items():
                parameter.mul_(mask)
        second, _ = gradients(step)
        with torch.no_grad():
            for parameter, value in zip([*hidden, *prunable], before, strict=True):
                parameter.copy_(value)
            for parameter, one, two in zip(hidden, first, second, strict=True):
                parameter.sub_(LR * (two * masks[parameter] + (one if plus else 0)))
            for parameter, grad in zip(rest, others, strict=True):
                parameter.sub_(OTHER_LR * grad)


def train_with_two(
    method: str, model: nn.Module, closures: Callable[[int], Callable[[], Any]]
) -> None:
    """As ``train_plainly``, by two optimizers."""
    hidden, rest = split(model)
    base = torch.optim.SGD(hidden.values(), lr=LR, foreach=True)
    other = torch.optim.SGD(rest.values(), lr=OTHER_LR, foreach=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "SAM":
            optimizer: CrAM = SAM(model, base, rho=RHO)
        else:
            plus = PAIRS[method]["plus"]
            optimizer = CrAM(model, base, sparsity=SPARSITY, rho=RHO, plus=plus)
    for step in range(NUM_STEPS):
        optimizer.step(closures(step))
        other.step()
        other.zero_grad()
