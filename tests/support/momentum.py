"""An optimizer whose first moments are of a class that knows little."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qsdp.methods.acdc.schedule import ACDCSchedule

aten = torch.ops.aten
BASICS = (aten.clone.default, aten.detach.default, aten.view.default)
SCHEDULE = ACDCSchedule(steps=12, warmup=2, phase=3, last_dense=2, last_sparse=2)


class Halves(Tensor):
    """Values of half precision, as optimizers of few bits keep them: of a class that knows little.

    ``knows`` is what may be done to it.
    """

    knows: tuple[Any, ...] = (aten.copy_.default,)

    @staticmethod
    def __new__(cls, halves: Tensor) -> Halves:
        made: Any = Tensor._make_wrapper_subclass(cls, halves.shape, dtype=torch.float32)
        return made

    def __init__(self, halves: Tensor) -> None:
        self.halves = halves

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (*BASICS, *cls.knows):
            raise NotImplementedError(f"{cls.__name__}: {func}")
        if func is aten.copy_.default:
            into, source = args
            into.halves.copy_(source.halves if isinstance(source, Halves) else source)
            return into
        if func is aten.zero_.default:
            args[0].halves.zero_()
            return args[0]
        return cls(func(args[0].halves, *args[1:]))


class KnowsZero(Halves):
    """As it was never copied to."""

    knows = (aten.zero_.default,)


class KnowsNothing(Halves):
    """Of what zeroing needs."""

    knows = ()


class Momentum(torch.optim.Optimizer):
    """SGD with momentum; what is smaller than ``least`` has moments of the plain kind."""

    kind: type[Halves] = Halves
    name = "exp_avg"

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1, least: int = 20) -> None:
        super().__init__(params, {"lr": lr})
        self.least = least

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"])

    def _move(self, parameter: Tensor, grad: Tensor, lr: float) -> None:
        state, whole = self.state[parameter], parameter
        parameter, grad = local(parameter), local(grad)
        if self.name not in state:
            zeros = torch.zeros_like(parameter, dtype=torch.float16)
            made = self.kind(zeros) if zeros.numel() >= self.least else zeros.float()
            state[self.name] = as_placed(made, whole)
        moment = local(state[self.name])
        values = moment.halves if isinstance(moment, Halves) else moment
        values.mul_(0.9).add_(grad)
        parameter.sub_(values, alpha=lr)


def as_placed(own: Tensor, whole: Tensor) -> Tensor:
    """A tensor sharded as ``whole`` is, of which this rank has ``own``."""
    if not isinstance(whole, DTensor):
        return own
    size = {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(own, whole.device_mesh, whole.placements, run_check=False, **size)


def local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def values_of(moment: Tensor) -> Tensor:
    moment = local(moment)
    return moment.halves if isinstance(moment, Halves) else moment
