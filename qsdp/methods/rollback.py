"""What passes of a model leave behind is undone: gathered weights, gradients and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from qsdp.common.model_structure import unique_tensors
from qsdp.compat.fsdp_state import with_enclosing_roots
from qsdp.compat.installed_wire import rewind_point
from qsdp.compat.interrupted_passes import abandon_passes
from qsdp.compat.module_buffers import snapshot_buffers


@contextmanager
def rollback_on_exception(model: nn.Module, restore: Callable[[], None]) -> Iterator[None]:
    """Rollback of an exception inside, as if no pass of ``model`` had been begun inside.

    The next try of the step gathers the same weights. Gradients that were not reduced are dropped,
    and ``restore`` is called.
    """
    rewind = rewind_point(model)
    try:
        yield
    except BaseException:
        abandon_passes(model)
        rewind()
        restore()
        raise


def snapshot_buffers_and_grads(model: nn.Module, own: Iterable[Tensor] = ()) -> Callable[[], None]:
    """A function that rolls back what passes of ``model`` change: its buffers and gradients.

    That is all buffers, and the gradients of all trained parameters but ``own``; also those of an
    FSDP2 root around it.
    """
    restore_buffers, known = snapshot_buffers(model), {*map(id, own)}
    parameters = unique_tensors(
        p for whole in with_enclosing_roots(model) for p in whole.parameters()
    )
    others = [p for p in parameters if p.requires_grad and id(p) not in known]
    grads = [p.grad if p.grad is None else p.grad.clone() for p in others]

    def restore() -> None:
        restore_buffers()
        for parameter, grad in zip(others, grads, strict=True):
            parameter.grad = grad

    return restore
