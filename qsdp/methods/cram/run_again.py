"""What makes a second pass the twin of the first: its inputs, its random numbers, no new counts."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, Set, Sized
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import get_device_states, set_device_states

from qsdp.compat.fsdp_state import with_enclosing_roots
from qsdp.compat.interrupted_passes import abandon_interrupted_pass, abandon_passes
from qsdp.compat.parameter_group import groups_have_pending_gradients
from qsdp.methods.cram.compressed_point import clear_grads

_OF_MODULES = {"_parameters", "_buffers", "_modules"}
"""What a module itself keeps: FSDP2 puts parameters in there, and CrAM restores buffers."""
_COUNTS = 1 << 16
_COPIED = (Tensor, np.ndarray, tuple, Set, MutableMapping, MutableSequence)


class _RandomState(NamedTuple):
    """The states of all generators that a forward pass may draw from."""

    python: Any
    numpy: Any
    cpu: Tensor
    devices: tuple[Any, ...]
    device_type: str

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        """The states as they are, of ``device`` too."""
        devices = get_device_states(torch.empty(0, device=device))
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        return cls(*states, devices, device.type)

    def restore(self) -> None:
        """Let all generators draw the same numbers once more."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        set_device_states(*self.devices, device_type=self.device_type)


@dataclass
class _MicroBatch:
    run: Callable[[], object]
    before_again: Callable[[], object]
    inputs: Any = None
    state: _RandomState | None = None


class MicroBatches:
    """The micro-batches of one step, which a trainer runs one by one and then all again.

    Where it prepares the inputs of one it asks ``prepared``.
    """

    def __init__(self) -> None:
        self._kept: list[_MicroBatch] = []
        self._current: _MicroBatch | None = None
        self.is_again = False
        """Whether this is the second pass."""

    @contextmanager
    def kept_with_grads(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        """Inside, passes of a micro-batch are run: what is kept is what gradients are there of.

        Where those of the micro-batches before were dropped, the step was given up in between.
        An exception inside gives it up.
        """
        for whole in with_enclosing_roots(model):
            abandon_interrupted_pass(whole)
        if self._kept and not _has_grads(model, optimizer):
            self._kept.clear()
        try:
            yield
        except BaseException:
            self.give_up(model, optimizer)
            raise

    def give_up(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Drop what is kept and the gradients of ``optimizer``, those that wait in FSDP2 too."""
        self._kept.clear()
        self._current = None
        abandon_passes(model)
        clear_grads(_parameters(optimizer))  # its zero_grad may leave them, as Accelerate's does

    def first(self, run: Callable[[], Any], before_again: Callable[[], object]) -> Any:
        """The result of ``run``, the forward and backward pass of a micro-batch.

        It is kept for ``again``, which calls ``before_again`` before it.
        """
        current = self._current = _MicroBatch(run, before_again)
        result = run()
        if current.state is None:
            raise RuntimeError(
                "inputs of a second pass are those of the first, which have not gone through "
                "QSDPMixin._prepare_inputs: call super()._prepare_inputs(inputs) in your own."
            )
        self._kept.append(current)
        return result

    def prepared(self, prepare: Callable[[], Any], device: torch.device) -> Any:
        """What ``prepare`` gives; in the second pass what it gave in the first.

        What a forward pass on ``device`` draws after it is then the same, too.
        """
        current, self._current = self._current, None
        if current is None:
            return prepare()
        if self.is_again:
            assert current.state is not None
            current.state.restore()
            return current.inputs
        inputs = prepare()
        current.inputs, current.state = _copied(inputs), _RandomState.now(device)
        return inputs

    def again(self, set_is_last: Callable[[bool], object], device: torch.device) -> None:
        """Run all once more; ``set_is_last`` hears before each whether it is the last."""
        kept, self._kept = self._kept, []
        after, self.is_again = _RandomState.now(device), True
        try:
            for left in reversed(range(len(kept))):
                self._current = kept.pop(0)
                set_is_last(not left)
                self._current.before_again()
                self._current.run()
        finally:
            self.is_again, self._current = False, None
            set_is_last(True)
            after.restore()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _has_grads(model: nn.Module, optimizer: Optimizer) -> bool:
    is_there = any(parameter.grad is not None for parameter in _parameters(optimizer))
    return is_there or groups_have_pending_gradients(model)


def accelerate_sync(accelerator: Any, model: Any) -> Callable[[bool], None]:
    """Says to Accelerate and FSDP2 whether the next backward pass is the last of its step.

    ``sync_each_batch``, of Accelerate's plugin for accumulation, has each of them reduced.
    """
    state = accelerator.gradient_state
    syncs_each = state.plugin_kwargs.get("sync_each_batch", False)

    def set_is_last(is_last: bool) -> None:
        state._set_sync_gradients(is_last)
        model.set_requires_gradient_sync(is_last or syncs_each)

    return set_is_last


@contextmanager
def counting_aside(counter: object) -> Iterator[None]:
    """Inside, ``counter`` may count in its attributes, which are as before in the end.

    They are numbers, tensors, arrays, lists, sets and dictionaries, in one another too: others see
    none of it. What another object counts stays, and so does what is in a data set, by its name, or
    in what is larger than counts are, of more than 65,536 values: in a tensor, or in the items of a
    container, which are not copied.
    """
    attributes = vars(counter)
    before = dict(attributes)
    attributes |= {
        name: _copied(value, at_most=_COUNTS)
        for name, value in before.items()
        if not name.endswith("_dataset") and name not in _OF_MODULES
    }
    try:
        yield
    finally:
        attributes.update(before)


def _copied(value: Any, at_most: float = math.inf, made: dict[int, Any] | None = None) -> Any:
    """``value`` with copies of tensors, arrays, containers and dataclasses in it.

    Other objects are the same ones, and so are the items of a container of more than ``at_most``,
    tensors and arrays of more values, containers that cannot be copied so, and tensors that
    gradients go through.
    """
    made = {} if made is None else made  # what a circle comes back to, by the id of the original
    if id(value) in made:
        return made[id(value)]
    is_data = is_dataclass(value) and not isinstance(value, type)
    if not (is_data or isinstance(value, _COPIED)):
        return value
    is_large = _size(value) > at_most
    if isinstance(value, Tensor | np.ndarray) and is_large:
        return value
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.clone()
    if isinstance(value, tuple):
        items = [_copied(item, at_most, made) for item in value]
        return value._make(items) if hasattr(value, "_make") else tuple(items)
    try:
        copied = made[id(value)] = copy.copy(value)
        if is_large:
            return copied
        if isinstance(value, MutableMapping):
            for key in value:
                copied[key] = _copied(value[key], at_most, made)
        elif isinstance(value, MutableSequence):
            for index, item in enumerate(value):
                copied[index] = _copied(item, at_most, made)
        elif is_data:
            for field in fields(value):
                item = _copied(getattr(value, field.name), at_most, made)
                object.__setattr__(copied, field.name, item)  # of frozen ones, too
    except Exception:  # of a class of the user's, which takes no such items
        made[id(value)] = value
        return value
    return copied


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, np.ndarray):
        return value.size
    return len(value) if isinstance(value, Sized) else 1
