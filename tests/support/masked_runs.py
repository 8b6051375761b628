"""AC/DC and gradual pruning over a small model, and their references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.gmp.schedule import GMPSchedule
from qsdp.sparsity.prunable import prunable_parameters
from tests.support.masked_reference import ReferenceMasked, acdc_phase, cubic
from tests_distributed.support.helpers import make_batch

STEPS = 24
PHASES = {"warmup": 3, "phase": 4, "last_dense": 3, "last_sparse": 5}
SCHEDULE = ACDCSchedule(steps=STEPS, **PHASES)
GRADUAL = GMPSchedule(steps=STEPS, sparsity=0.9, initial=0.3, start=2, every=5, end=19)
BASES: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}
SIZES = {"width": 16, "hidden": 8}


def is_compressed(step: int) -> bool:
    return acdc_phase(step, STEPS, *PHASES.values())


def acdc_reference(model: nn.Module, base: Any, keeps: dict[str, Any], **options: Any) -> Any:
    def renewed(done: int) -> dict[str, Any] | None:
        return keeps if is_compressed(done) and not is_compressed(done - 1) else None

    return _reference(model, base, is_compressed, renewed, **options)


def gmp_reference(model: nn.Module, base: Any, keeps: dict[str, Any], **options: Any) -> Any:
    def renewed(done: int) -> dict[str, Any] | None:
        if done not in (2, 7, 12, 17):
            return None
        return {**keeps, "sparsity": cubic((done - 2) / 15, 0.9, 0.3)}

    return _reference(model, base, lambda step: step >= 2, renewed, **options)


def _reference(model: Any, base: Any, *plan: Any, **options: Any) -> ReferenceMasked:
    names = [n for n, p in prunable_parameters(model).items() if p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    dims = [0 if model.config.conv1d else 1] * len(names)
    return ReferenceMasked(model, base(trained), names, *plan, dims, **options)


def backward(model: nn.Module, step: int) -> float:
    model.zero_grad()
    loss = model(*make_batch(model, seed=step, rank=0))
    loss.backward()
    return loss.item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
