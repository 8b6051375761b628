"""CrAM and its top-K written from the paper on plain tensors: what the optimizer is compared with.

Shares nothing with qsdp: gradients by ``torch.autograd.grad`` of a functional loss, masks by a
stable sort, the base optimizer (SGD with momentum and weight decay) by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def top_k_masks(tensors: list[Tensor], num_keep: int) -> list[Tensor]:
    """True at the ``num_keep`` largest magnitudes of all tensors; the first of equal ones win."""
    flat = torch.cat([tensor.flatten().double().abs() for tensor in tensors])
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[flat.sort(descending=True, stable=True).indices[:num_keep]] = True
    parts = keep.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@dataclass
class ReferenceCrAM:
    """Weights, and the CrAM steps that are taken on them."""

    weights: Weights
    prunable: list[str]
    loss: Callable[[Weights], Tensor]
    rho: float = 0.05
    plus: bool = True
    normalize: bool = False
    sparse_grad: bool = True
    max_norm: float | None = None
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.01
    velocity: Weights = field(default_factory=dict)

    def grads(self, weights: Weights) -> tuple[Weights, float]:
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        loss = self.loss(leaves)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True)), loss.item()

    def step(self, sparsity: float) -> tuple[float, Weights, Weights]:
        """One step; returns the dense loss, the masks and the gradient before clipping."""
        first, loss = self.grads(self.weights)
        scale = self.rho / (_norm(first) if self.normalize else 1)
        point = {name: value + scale * first[name] for name, value in self.weights.items()}
        total = sum(point[name].numel() for name in self.prunable)
        num_keep = total - round(sparsity * total)
        kept = top_k_masks([point[name] for name in self.prunable], num_keep)
        masks = dict(zip(self.prunable, kept, strict=True))
        for name, mask in masks.items():
            point[name] = torch.where(mask, point[name], 0.0)
        second, _ = self.grads(point)
        if self.sparse_grad:
            for name, mask in masks.items():
                second[name] = torch.where(mask, second[name], 0.0)
        grads = {n: first[n] + g for n, g in second.items()} if self.plus else second
        limit = math.inf if self.max_norm is None else self.max_norm * (2 if self.plus else 1)
        factor = min(1.0, limit / _norm(grads))
        for name, weight in self.weights.items():
            grad = factor * grads[name] + self.weight_decay * weight
            self.velocity[name] = self.momentum * self.velocity.get(name, 0) + grad
            self.weights[name] = weight - self.lr * self.velocity[name]
        return loss, masks, grads


def _norm(grads: Weights) -> float:
    return math.sqrt(sum(grad.double().square().sum().item() for grad in grads.values()))
