"""Buffers of modules, put back as they were."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qsdp.compat.fsdp_state import with_enclosing_roots


def snapshot_buffers(model: nn.Module) -> Callable[[], None]:
    """A function that restores the buffers of ``model``'s modules, and of FSDP2 roots around it.

    They become what they are now, in place; those that were replaced meanwhile are put back.
    """
    modules = {id(m): m for whole in with_enclosing_roots(model) for m in whole.modules()}
    kept = [(m, name, b) for m in modules.values() for name, b in m._buffers.items()]
    buffers = {id(b): b for *_, b in kept if b is not None and not is_lazy(b) and not b.is_nested}
    saved = [(b, b.shape, _without_repeats(b).clone()) for b in buffers.values()]

    def restore() -> None:
        for module, name, buffer in kept:
            module._buffers[name] = buffer
        for buffer, shape, values in saved:
            with torch.inference_mode(buffer.is_inference()):
                if buffer.shape != shape:
                    buffer.data = values.expand(shape)
                else:
                    _without_repeats(buffer).copy_(values)

    return restore


def _without_repeats(tensor: Tensor) -> Tensor:
    """A view of ``tensor`` without the values that share the memory of others (``expand``)."""
    view = tensor.detach()
    if view.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
            if size > 1 and stride == 0:
                view = view.narrow(dim, 0, 1)
    return view
