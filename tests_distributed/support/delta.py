"""What tests of gathers that send changes alone share: models, weights as decoded, bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import qsdp
from tests_distributed.support.helpers import Toy, make_batch, make_model, shard
from tests_distributed.support.training import State

HEADER_BYTES = 128
"""More than the header and the bitmap of any group here take."""


def installed(
    seed: int, config: dict[str, Any], *, reshard: bool | None = True, **options: Any
) -> tuple[Any, qsdp.Handle]:
    """A sharded toy of ``options`` with a wire that sends changes."""
    model = shard(make_model(seed, **options), reshard=reshard)
    return model, qsdp.install(model, qsdp.QSDPConfig(**{"gather": "delta", **config}))


def wide(seed: int, config: dict[str, Any], **options: Any) -> tuple[Any, qsdp.Handle]:
    """Such a one of more than 100,000 weights in few values of norms and biases."""
    sizes = {"num_layers": 1, "width": 128, "hidden": 256}
    return installed(seed, config, **sizes, **options)


def decoded(model: nn.Module) -> State:
    """The weights as gathers bring them now, outside of any pass."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.reshard()
        module.unshard()
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for module in modules:
        module.reshard()
    return found


def take_sgd_step(model: Toy, seed: int, rate: float) -> float:
    """One step of plain SGD."""
    loss: Tensor = model(*make_batch(model, seed))
    torch.autograd.backward(loss)
    descend(model.parameters(), rate)
    return float(loss.detach())


@torch.no_grad()
def descend(parameters: Iterable[nn.Parameter], rate: float) -> None:
    """Follow the gradients, and drop them."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.add_(parameter.grad, alpha=-rate)
        parameter.grad = None


def sent_while(handle: qsdp.Handle, act: Callable[[], object]) -> dict[str, int]:
    """By how much each counter of this rank grows in ``act``."""
    before = Counter(handle.traffic.snapshot())
    act()
    after = handle.traffic.snapshot()
    return {name: after[name] - before[name] for name in after}


def num_buckets(model: nn.Module, bucket_size: int, num_ranks: int) -> int:
    """Buckets of all ranks' shards of the matrices, as torch.chunk cuts them along dim 0."""
    found = 0
    for parameter in model.parameters():
        rows, *rest = parameter.shape
        for rank in range(num_ranks if rest else 0):
            mine = min(-(-rows // num_ranks), max(0, rows - rank * -(-rows // num_ranks)))
            found += math.ceil(mine * math.prod(rest) / bucket_size)
    return found


def same_on_all_ranks(state: State) -> bool:
    """Whether all ranks have the very same. A collective."""
    mine = {
        name: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, value in state.items()
    }
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return all(each == mine for each in everyones)
