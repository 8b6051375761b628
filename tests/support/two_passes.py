"""A training by steps of two passes, in the form of a closure or in that of ``second_pass``."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.sam.optimizer import SAM
from tests.support.second_pass import everything, local, split

SPARSITY = (0.3, 0.6)
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
FORMS = ("context", "scaler", "number")
NUMBER = 8.0
INIT_SCALE = 1024.0


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **SGD, foreach=True)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=True)


@dataclass
class Case:
    """What steps, and over what."""

    base: Callable[[Any], torch.optim.Optimizer] = sgd
    options: dict[str, Any] | None = None
    """Those of CrAM; None for SAM."""
    toy: dict[str, Any] | None = None
    """The peculiarities of a ``Toy``; None for a net with buffers of every kind."""
    is_part: bool = False
    """The base has the matrices of the blocks; another optimizer steps the rest."""

    def wrap(self, model: nn.Module, base: torch.optim.Optimizer) -> CrAM:
        with warnings.catch_warnings():  # of what a part leaves out
            warnings.simplefilter("ignore")
            if self.options is None:
                return SAM(model, base)
            return CrAM(model, base, **{"sparsity": SPARSITY, **self.options})


CASES = {
    "CrAM+": Case(options={}),
    "CrAM+ of a part": Case(adamw, options={}, is_part=True),
    "CrAM": Case(adamw, options={"plus": False}, toy={"tied": True, "frozen": True}),
    "SAM": Case(toy={"unused": True, "tied": True}),
    "SAM with buffers": Case(adamw),
    "normalized": Case(adamw, options={"normalize": True, "rho": 0.5, "sparse_grad": False}),
    "clipped": Case(options={"max_norm": 0.05}, toy={"frozen": True, "unused": True}),
    "clipped CrAM": Case(adamw, options={"max_norm": 0.05, "plus": False}, toy={}),
    "rounded": Case(options={"sparsity": ("0.5+4bit", "3bit")}, toy={"checkpointing": True}),
}


class Training:
    """Steps of one of ``CASES``."""

    def __init__(
        self,
        case: Case,
        form: str,
        model: Any,
        batch: Callable[[int], Any],
        *,
        called: Any = None,
        num_micro: int = 1,
        spoilt: tuple[int, int] | None = None,
    ) -> None:
        """``spoilt``: the step and the pass, 1 or 2, whose loss is infinite here."""
        self.form, self.model, self.batch, self.num_micro = form, model, batch, num_micro
        self.called = model if called is None else called
        self.spoilt = spoilt
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        mine, rest = split(model) if case.is_part else (trained, {})
        self.base = case.base(mine.values())
        self.optimizer = case.wrap(model if case.is_part else self.called, self.base)
        self.other = torch.optim.SGD(rest.values(), lr=0.1, foreach=True) if rest else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE, growth_interval=2)
        self.scale: Any = {"scaler": self.scaler, "number": NUMBER}.get(form)

    def multiplied(self, loss: Tensor) -> Tensor:
        if self.form == "scaler":
            return self.scaler.scale(loss)
        return loss if self.scale is None else loss * self.scale

    def waiting(self, is_last: bool) -> AbstractContextManager[object]:
        """Where gradients of a micro-batch wait for those of the last one."""
        if isinstance(self.called, FSDPModule):
            self.called.set_requires_gradient_sync(is_last)
        elif isinstance(self.called, DistributedDataParallel) and not is_last:
            return self.called.no_sync()
        return contextlib.nullcontext()

    def run_pass(self, step: int, number: int = 1) -> None:
        """Forward and backward over all micro-batches; ``number`` is 1 or 2."""
        for micro in range(self.num_micro):
            with self.waiting(micro == self.num_micro - 1):
                loss = self.called(*self.batch(10 * step + micro)) / self.num_micro
                if self.spoilt == (step, number):
                    loss = loss * math.inf
                self.multiplied(loss).backward()
        if isinstance(self.called, FSDPModule):
            with torch.no_grad():  # as for an accuracy: it leaves weights gathered
                self.called(*self.batch(10 * step))

    def second(self, step: int) -> None:
        """The second pass of ``step``, after the first."""
        with self.optimizer.second_pass(scale=self.scale):
            self.run_pass(step, 2)

    def end(self) -> None:
        """What comes after both passes."""
        optimizers = [each for each in (self.optimizer, self.other) if each is not None]
        for optimizer in optimizers:
            if self.form == "scaler":
                self.scaler.step(optimizer)
                continue
            if self.scale is not None:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            local(parameter.grad).div_(self.scale)
            optimizer.step()
        if self.form == "scaler":
            self.scaler.update()

    def take(self, step: int) -> None:
        """A whole step, after which there are no gradients."""
        if self.form == "closure":
            numbers = iter((1, 2))
            self.optimizer.step(lambda: self.run_pass(step, next(numbers)))
            if self.other is not None:
                self.other.step()
        else:
            self.run_pass(step)
            self.second(step)
            self.end()
        self.called.zero_grad()

    def found(self) -> dict[str, Any]:
        """All that both forms have in common, bit for bit."""
        optimizer = self.optimizer
        for module in self.called.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # gathered ones are others, which numpy must not hold
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.state_dict()["param_groups"]
        ]
        return everything(self.model, self.base) | {
            "num_steps": optimizer.num_steps,
            "skipped_steps": optimizer.skipped_steps,
            "groups": str(groups),
            "last_target": str(optimizer.last_target),
            "last_grad_norm": str(optimizer.last_grad_norm),
        }


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """In what they differ: a comparison of whole bits tells nobody anything."""
    assert found.keys() == expected.keys()
    return [name for name in found if found[name] != expected[name]]


def is_advice(text: str) -> bool:
    """Whether it is one sentence that says what was given and what to do."""
    return "\n" not in text and ": " in text and text.endswith(".") and len(text) < 400
