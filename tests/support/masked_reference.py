"""AC/DC, gradual pruning and SAM step by step on a plain model: shares nothing with qsdp."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.support.compression_reference import kept


def acdc_phase(t: int, steps: int, warmup: int, phase: int, dense: int, sparse: int) -> bool:
    """Whether step t is compressed, as the paper's schedule is written."""
    if t < warmup:
        return False
    if t >= steps - sparse:
        return True
    if t >= steps - sparse - dense:
        return False
    return ((t - warmup) // phase) % 2 == 0


def cubic(t: float, sparsity: float, initial: float) -> float:
    """The sparsity of gradual pruning at the share t of its way."""
    return sparsity + (initial - sparsity) * (1 - t) ** 3


@dataclass
class ReferenceMasked:
    """A model, its torch.optim optimizer, and steps under masks."""

    model: nn.Module
    base: torch.optim.Optimizer
    names: list[str]
    is_masked: Callable[[int], bool]
    """By step."""
    renewed: Callable[[int], dict | None]
    """By steps done: what ``kept`` is to keep from then on; None where nothing is renewed."""
    dims: list[int]
    max_norm: float = math.inf
    masks: dict[str, Tensor] = field(default_factory=dict)
    done: int = 0

    def __post_init__(self) -> None:
        self.weights = {name: self.model.get_parameter(name) for name in self.names}
        self.masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights.items()}

    @torch.no_grad()
    def step(self) -> None:
        """After the backward pass."""
        masked = self.is_masked(self.done)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if masked:
            for name, mask in self.masks.items():
                if self.weights[name].grad is not None:
                    self.weights[name].grad[~mask] = 0.0
        norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
        for grad in grads:
            grad.mul_(min(1.0, self.max_norm / norm))
        self.base.step()
        if masked:
            self._prune()
        self.done += 1
        keeps = self.renewed(self.done)
        if keeps is not None:
            found = kept([w.detach() for w in self.weights.values()], self.dims, **keeps)
            self.masks = dict(zip(self.names, found, strict=True))
            self._prune()
        elif masked and not self.is_masked(self.done):
            for mask in self.masks.values():
                mask.fill_(True)
            for state in self.base.state.values():
                for moment in ("exp_avg", "momentum_buffer"):
                    if moment in state:
                        state[moment].zero_()

    def _prune(self) -> None:
        for name, mask in self.masks.items():
            self.weights[name][~mask] = 0.0


def sam_step(
    model: nn.Module, loss: Callable[[], Tensor], base: torch.optim.SGD, rho: float
) -> None:
    """Foret et al., algorithm 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(), trained)
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    before = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for parameter, grad in zip(trained, grads, strict=True):
            parameter += rho * grad / norm
    grads = torch.autograd.grad(loss(), trained)
    with torch.no_grad():
        for parameter, value, grad in zip(trained, before, grads, strict=True):
            parameter.copy_(value)
            parameter.grad = grad
    base.step()
