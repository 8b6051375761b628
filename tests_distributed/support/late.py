"""Trainings whose reduces are left to the wire or waited for, and what is seen of either.

While a reduce is under way on CPUs, the gradients of its group are NaN: that is how a test, and a
hook in the middle of a backward pass, can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.hooks import RemovableHandle

import qsdp
from qsdp.compat.parameter_group import parameter_groups
from tests_distributed.support.helpers import Toy, make_batch, make_model, shard, wire_config

NUM_LAYERS = 3
MOST = 2
"""Groups whose reduces may be under way at once."""

# --- what only those know who know qsdp's and FSDP2's insides -------------------------------------


def num_under_way(handle: qsdp.Handle) -> int:
    """How many reduces a handle's wire has left to finish."""
    return handle._wire.late.num_under_way


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, every reduce is waited for at once."""
    with mock.patch("qsdp.fsdp.reduce_hook.views_may_fill_later", return_value=False):
        yield


def reduce_outside_of_backward(model: Any) -> None:
    """What pipelining does after the last of its micro-batches."""
    model.set_requires_gradient_sync(True)
    for group in parameter_groups(model):
        group.fsdp_param_group.post_backward()
    model._get_fsdp_state()._root_post_backward_final_callback()


# --------------------------------------------------------------------------------------------------


class Watch:
    """Looks at the gradients of a model in the middle of each block's backward pass.

    ``seen`` has for each look of how many groups the gradients are NaN.
    """

    def __init__(self, model: Any) -> None:
        self.groups = groups_of(model)
        self.seen: list[int] = []
        for block in dict.fromkeys(model.blocks):
            block.norm1.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self.seen.append(self.num_late()))

    def num_late(self) -> int:
        return sum(map(is_late, self.groups))


def groups_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """The shards, by group."""
    return [group.sharded_parameters() for group in parameter_groups(model)]


def is_late(parameters: list[nn.Parameter]) -> bool:
    """Whether gradients of a group are NaN."""
    grads = (p.grad.to_local() for p in parameters if p.grad is not None)  # type: ignore[attr-defined]
    return any(bool(grad.isnan().any()) for grad in grads)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train."""

    ranks: tuple[int, ...] = (2, 3)
    """Of the shard group and its replicas, those it can be had with."""
    num_steps: int = 2
    late: bool | None = True
    """Whether reduces are seen to be under way; None: either way is right."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the model."""
    config: dict[str, Any] = field(default_factory=dict)
    sharding: dict[str, Any] = field(default_factory=dict)
    """What ``shard`` is given."""
    dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None)
    """Parameter and reduce dtype of the mixed-precision policy."""
    shards: torch.dtype = torch.float32
    """The type of the shards themselves."""
    make: Callable[[Toy], Any] | None = None
    """Shards the model in place of ``shard``; returns more options of ``install``."""
    prepare: Callable[[Job], None] = lambda job: None
    """Comes after ``install``."""
    step: Callable[[Job, int], None] = lambda job, step: job.take(step)


class Job:
    """One training on one rank."""

    def __init__(self, way: Way, gather: str) -> None:
        self.way = way
        self.model: Any = make_model(1, **{"num_layers": NUM_LAYERS, **way.options})
        self.model.to(way.shards)
        param_dtype, reduce_dtype = way.dtypes
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
        options: dict[str, Any] = {}
        if way.make is not None:
            options = way.make(self.model) or {}
        else:
            shard(self.model, **{"nested": False, "mp_policy": policy, **way.sharding})
        self.config = wire_config(64, **{"gather": gather, "seed": 3, **way.config})
        self.handle = qsdp.install(self.model, self.config, **options)
        self.models: list[Any] = [self.model]
        self.found: dict[str, Tensor] = {}
        self.hooks: list[RemovableHandle] = []
        self.watch = Watch(self.model)
        way.prepare(self)
        trained = [p for model in self.models for p in model.parameters() if p.requires_grad]
        self.optimizer: Any = torch.optim.SGD(trained, lr=0.1, momentum=0.9, foreach=True)

    def loss(self, seed: int) -> Tensor:
        loss: Tensor = self.model(*make_batch(self.model, seed))
        return loss

    def backward(self, loss: Tensor, **options: Any) -> None:
        """A backward pass, of which all gradients are noted."""
        torch.autograd.backward(loss, **options)
        self.note({"loss": loss.detach()})
        self.note_grads()

    def note_grads(self) -> None:
        for i, model in enumerate(self.models):
            parameters = model.named_parameters()
            grads = {f"{name} of {i}": p.grad for name, p in parameters if p.grad is not None}
            self.note({f"gradient of {name}": grad.to_local() for name, grad in grads.items()})

    def note(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.found[f"{len(self.found)}, {name}"] = tensor.clone()

    def take(self, step: int) -> None:
        """A plain step."""
        self.optimizer.zero_grad()
        self.backward(self.loss(step))
        self.optimizer.step()

    def train(self) -> dict[str, Tensor]:
        """Take the way's steps. Returns all that was noted, and the weights at the end."""
        for step in range(self.way.num_steps):
            self.way.step(self, step)
            assert not num_under_way(self.handle)
        for i, model in enumerate(self.models):
            parameters = model.named_parameters()
            self.note({f"{name} of {i}": p.to_local().detach() for name, p in parameters})
        for hook in self.hooks:  # torch keeps them in C++, and what they hold with them
            hook.remove()
        return self.found


def late_and_waiting(way: Way, gather: str) -> tuple[list[str], list[int], list[int]]:
    """What differs between the two, and of how many groups gradients were late at each look."""
    late = Job(way, gather)
    found = late.train()
    waits = Job(way, gather)
    with waiting():
        expected = waits.train()
    assert expected
    return differing(found, expected), late.watch.seen, waits.watch.seen


# --- what comes after ``install`` in several files ------------------------------------------------

BESIDE = ("blocks.2.out.bias", "blocks.1.out.bias", "blocks.0.out.bias", "embed.weight")
"""A parameter of each group, in the order of the groups' reduces."""


def wait_at_once(job: Job, how: str, place: int, model: int = 0) -> None:
    """Let this rank wait for the reduces of the group at that place of a model."""
    parameter = job.models[model].get_parameter(BESIDE[place])
    if how == "hook":  # the others hear of it, and wait too
        job.hooks.append(parameter.register_post_accumulate_grad_hook(lambda _: None))
    else:
        parameter.grad = torch.zeros_like(parameter)


def keep_gradients(job: Job, ranks: tuple[int, ...]) -> None:
    """Some ranks keep the gradients of the second block, all zero, from step to step."""
    if dist.get_rank() not in ranks:
        return

    def keep(_: nn.Module, args: object) -> None:
        for parameter in job.watch.groups[2]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    job.model.register_forward_pre_hook(keep)


def optimize_inside(job: Job, ranks: tuple[int, ...] | None = None) -> None:
    """Hooks that update the second block, and drop its gradients, inside the backward pass."""
    if ranks is not None and dist.get_rank() not in ranks:
        return

    def update(parameter: Any) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None

    for parameter in job.model.blocks[1].parameters():
        job.hooks.append(parameter.register_post_accumulate_grad_hook(update))


def add_another_model(job: Job) -> None:
    other = shard(make_model(2), nested=False)
    qsdp.install(other, job.config)
    job.models.append(other)


def take_two_models(job: Job, step: int) -> None:
    """One backward pass of two models, each with a wire of its own."""
    job.optimizer.zero_grad()
    other = job.models[1]
    job.backward(job.loss(step) + other(*make_batch(other, 100 + step)))
    job.optimizer.step()


# --- an exception in the backward pass of all ranks -----------------------------------------------


class Fault(Exception):
    """What a user's code raises."""


def cut_short(model: Any, seed: int, block: int = 0) -> None:
    """A backward pass that raises in the middle of a block, after the reduce of the one behind."""

    def fail(*_: object) -> None:
        raise Fault

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(fail)

    watching = model.blocks[block].norm1.register_forward_hook(watch)
    loss = model(*make_batch(model, seed))
    watching.remove()
    with pytest.raises(Fault):
        torch.autograd.backward(loss)


# --------------------------------------------------------------------------------------------------


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What is not bit for bit the same, the sign of a zero left out. NaN is the same as nothing."""
    if found.keys() != expected.keys():
        return [f"{found.keys() ^ expected.keys()}"]
    return [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
