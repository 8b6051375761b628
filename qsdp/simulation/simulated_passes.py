"""Forward and backward of one simulated rank, with weights that are given to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qsdp.compat.parameter_names import clean_names, named_buffers


class SimulatedPasses:
    """Simulated passes, forward and backward, of a model with weights that are not its own.

    All ranks share one set of ``buffers``.

    Args:
        model: The plain model, which is not changed.
        loss: Makes a scalar of what the model returns; None if it returns a scalar.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor] | None) -> None:
        # A layer that writes its buffers must not write the user's.
        self.buffers = {name: buffer.clone() for name, buffer in named_buffers(model).items()}
        self._pass = _Pass(model, loss)

    def loss_and_grads(
        self, weights: Mapping[str, Tensor], trained: Collection[str], batch: Any, scale: float
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss of ``batch``, and the gradients of ``scale`` times it.

        Args:
            weights: Every whole parameter, by name.
            trained: The names of those that need a gradient.
            batch: The positional arguments of the model, or a mapping of its keyword arguments.
            scale: A factor of the loss.

        Raises:
            ValueError: The loss is not a scalar.
        """
        leaves = {
            name: value.detach().requires_grad_(name in trained) for name, value in weights.items()
        }
        whole = {
            self._pass.names[name]: value for name, value in {**self.buffers, **leaves}.items()
        }
        loss = functional_call(self._pass, whole, (batch, scale))
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return float(loss.detach()), grads


@contextmanager
def casting_inputs(modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Within the context, simulated passes cast inputs of groups to the parameter dtype.

    FSDP2 does so by default.
    """

    def cast(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast(args, dtype), _cast(kwargs, dtype)

    hooks = [
        module.register_forward_pre_hook(cast, prepend=True, with_kwargs=True)
        for module in (modules if dtype != torch.float32 else ())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def noting_groups(modules: Mapping[nn.Module, int | None]) -> Iterator[set[int | None]]:
    """Within the context, groups of which simulated passes run a module are put into what it gives.

    FSDP2 gathers these groups alone.
    """
    found: set[int | None] = set()
    hooks = [
        module.register_forward_pre_hook(partial(_note, found, group))
        for module, group in modules.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _note(found: set[int | None], group: int | None, *_: Any) -> None:
    found.add(group)


class _Pass(nn.Module):
    """Forward and backward in one call.

    So what is recomputed in the backward pass sees the parameters of ``functional_call`` too.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor] | None) -> None:
        super().__init__()
        self.model, self._loss = model, loss
        held = [*self.named_parameters(), *self.named_buffers()]
        own = [name for name, _ in held if name.startswith("model.")]  # a loss may hold some too
        clean = clean_names(self, own)
        self.names = {short.removeprefix("model."): name for name, short in clean.items()}
        """The name that finds each parameter here, by its clean name in the model."""

    def forward(self, batch: Any, scale: float) -> Tensor:
        """Run the model, and the backward pass of its scaled loss."""
        if isinstance(batch, Mapping):
            output = self.model(**batch)
        else:
            output = self.model(*((batch,) if isinstance(batch, Tensor) else batch))
        loss = output if self._loss is None else self._loss(output)
        if not isinstance(loss, Tensor) or loss.dim():
            what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else "no tensor"
            raise ValueError(
                f"the loss is {what}: give `loss`, which makes a scalar of the output."
            )
        torch.autograd.backward(loss * scale)
        return loss


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors in nested lists, tuples and dictionaries, in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cast(entry, dtype) for entry in value)
    return value
