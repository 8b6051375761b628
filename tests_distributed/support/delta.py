"""What tests of gathers that send changes alone share: models, weights as decoded, bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import qsdp
from qsdp import ops
from qsdp.sparsity.local_shards import local_shard
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


@contextmanager
def other_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the weights are others, some of them zero; then they are as before, bit for bit."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # or these would be what is gathered, and not the shards
    with torch.no_grad():
        shards = [local_shard(p).values for p in model.parameters()]
        before = [values.clone() for values in shards]
        for values in shards:
            values.mul_(1.5)[:1] = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for values, old in zip(shards, before, strict=True):
                values.copy_(old)


@contextmanager
def fails_to_apply(model: Any, error: type[BaseException]) -> Iterator[list[str]]:
    """Inside, the first frame of the forward pass's last group cannot be applied."""
    apply, failed, is_armed = ops.apply_changes, [], False

    def apply_or_fail(*args: Any) -> None:
        if is_armed and not failed:
            failed.append("here")
            raise error("an interruption")
        apply(*args)

    def arm(*_: object) -> None:
        nonlocal is_armed
        is_armed = True

    hook = model.blocks[-1].norm2.register_forward_hook(arm)
    with mock.patch.object(ops, "apply_changes", apply_or_fail):
        yield failed
    hook.remove()


def interrupted_at(model: Any, handle: qsdp.Handle, frame: int) -> tuple[list[str], list[bool]]:
    """What this rank says in three steps, and whether all decode the same after those that end.

    In the second step of the training it is interrupted while it applies the ``frame``-th frame.
    """
    take_sgd_step(model, 0, 0.1)
    apply, num_calls = ops.apply_changes, 0

    def apply_or_fail(*args: Any) -> None:
        nonlocal num_calls
        if num_calls == frame:
            raise KeyboardInterrupt
        num_calls += 1
        apply(*args)

    with mock.patch.object(ops, "apply_changes", apply_or_fail), pytest.raises(KeyboardInterrupt):
        model(*make_batch(model, 1))
    handle.abandon_step()
    said, same = [], []
    for step in range(3):
        try:
            take_sgd_step(model, step, 0.1)
            same.append(same_on_all_ranks(decoded(model)))
        except RuntimeError as error:
            said.append(str(error))
            model.zero_grad()
    return said, same


Masks = dict[str, Tensor]
"""By the names of parameters, what this rank keeps of its shards."""


def masks_of(model: nn.Module, share: float, seed: int = 0) -> Masks:
    """Masks of the blocks' matrices, which keep about a ``share`` of this rank's shards."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    return {
        name: torch.rand(local_shard(p).values.shape, generator=generator) < share
        for name, p in model.named_parameters()
        if "blocks" in name and p.ndim == 2
    }


@torch.no_grad()
def prune(model: nn.Module, masks: Masks) -> None:
    """Set to +0.0 what ``masks`` do not keep."""
    for name, mask in masks.items():
        local_shard(model.get_parameter(name)).values.masked_fill_(~mask, 0.0)


def support(model: nn.Module, masks: Masks) -> dict[nn.Parameter, Tensor]:
    """``masks`` as ``Handle.set_support`` takes them."""
    return {model.get_parameter(name): mask for name, mask in masks.items()}


def num_kept_buckets(model: nn.Module, masks: Masks, bucket_size: int, names: Iterable[str]) -> int:
    """Buckets of all ranks' shards of the matrices among ``names`` under ``masks``. A collective.

    Shards are as torch.chunk cuts them along dim 0.
    """
    mine = 0
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.ndim > 1:
            kept = masks.get(name)
            values = local_shard(parameter).values
            mine += math.ceil((values.numel() if kept is None else int(kept.sum())) / bucket_size)
    total = torch.tensor(mine)
    dist.all_reduce(total)
    return int(total)


def named_in_groups(handle: qsdp.Handle) -> dict[int, list[str]]:
    """The names of parameters by the group that they travel in."""
    found: dict[int, list[str]] = {}
    for row in handle.report().rows:
        if row.group is not None:
            found.setdefault(row.group, []).append(row.name)
    return found


def bits_of(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The very bits of this rank's parts."""
    return {
        name: local_shard(value)
        .values.detach()
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for name, value in tensors.items()
    }


def same_on_all_ranks(state: State) -> bool:
    """Whether all ranks have the very same. A collective."""
    mine = {
        name: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, value in state.items()
    }
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return all(each == mine for each in everyones)
