"""Trainings that a user's exception interrupts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import qsdp
from tests_distributed.support.helpers import make_batch, make_model, shard

NUM_STEPS = 4
LEARNED = qsdp.QSDPConfig(weight_bits=4, grad_bits=4, levels="learned", level_steps=(1, 3), seed=3)
BUDGET = qsdp.QSDPConfig(budget=5.0, warmup_steps=1)

Between = Callable[[Tensor], Any]


class Fault(Exception):
    """What a user's code raises."""


class RaisesBackward(torch.autograd.Function):
    """Copies, and raises in the backward pass."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *__: Any) -> Any:
        raise Fault


def fail(*_: Any) -> Any:
    raise Fault


@dataclass(frozen=True)
class Setting:
    """How a toy is trained."""

    method: str
    gather: str | None
    """None: without the wire."""
    reshard: bool | None = None
    num_micro: int = 1


class Job:
    """One run on every rank."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = shard(make_model(frozen=True), nested=False, reshard=setting.reshard)
        self.handle: qsdp.Handle | None = None
        if setting.gather is not None:
            config = LEARNED if setting.num_micro == 1 else BUDGET
            self.handle = qsdp.install(self.model, replace(config, gather=setting.gather))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.base = torch.optim.AdamW(trained, lr=1e-2, foreach=True)
        self.optimizer = _optimizer(setting.method, self.model, self.base)
        if self.handle is not None and setting.gather == "delta" and setting.method != "AdamW":
            self.optimizer.share_support(self.handle.set_support)
        self.losses: list[float] = []

    def take(
        self, step: int, fault: Callable[[], AbstractContextManager[Between | None]] = nullcontext
    ) -> None:
        """Take a step, with every forward pass inside a ``fault``, which may change the loss."""

        def closure() -> float:
            self.optimizer.zero_grad()
            total = 0.0
            for micro in range(self.setting.num_micro):
                is_last = micro == self.setting.num_micro - 1
                self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
                with fault() as between:
                    loss = self.model(*make_batch(self.model, 10 * step + micro))
                    loss = loss if between is None else between(loss)
                torch.autograd.backward(loss)
                total += loss.item()
            return total

        if self.setting.method == "AdamW":
            loss = closure()
            self.optimizer.step()
        else:
            loss = self.optimizer.step(closure)
        self.losses.append(loss)

    def state(self) -> list[Any]:
        """All that training has left on this rank."""
        moments = [v for state in self.base.state.values() for v in state.values()]
        tensors = [*self.model.parameters(), *(v for v in moments if isinstance(v, Tensor))]
        wire = None if self.handle is None else self.handle.state_dict()
        return [[bytes_of(tensor) for tensor in tensors], self.losses, wire]


def bytes_of(tensor: Tensor) -> bytes:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def _optimizer(method: str, model: nn.Module, base: torch.optim.Optimizer) -> Any:
    if method == "AdamW":
        return base
    if method == "SAM":
        return qsdp.SAM(model, base)
    if method == "ACDC":
        schedule = qsdp.ACDCSchedule(steps=4, warmup=1, phase=1, last_dense=1, last_sparse=1)
        return qsdp.ACDC(model, base, schedule=schedule, target=0.5)
    if method == "GMP":
        schedule = qsdp.GMPSchedule(steps=4, start=1, end=3, every=1, initial=0.2, sparsity=0.6)
        return qsdp.GMP(model, base, schedule=schedule)
    return qsdp.CrAM(model, base, plus=method == "CrAM+", sparsity=(0.3, 0.6))


@contextmanager
def hooked(model: Any, where: str) -> Iterator[None]:
    """Inside, a forward pass of ``model`` raises in its middle, or its backward pass will."""
    in_backward = where == "backward"
    hook = model.blocks[not in_backward].register_forward_hook(
        (lambda *args: RaisesBackward.apply(args[2])) if in_backward else fail
    )
    try:
        yield
    finally:
        hook.remove()


def both(function: Callable[[bool], Any]) -> bool:
    return bool(function(False) == function(True))
