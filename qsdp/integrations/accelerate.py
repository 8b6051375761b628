"""Accelerate: the quantized wire, and methods such as CrAM, in loops around an ``Accelerator``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

import qsdp
from qsdp.compat.installed_wire import passes_of
from qsdp.fsdp.wire_file import load_wire, save_wire
from qsdp.methods.cram.run_again import MicroBatches, accelerate_sync
from qsdp.methods.cram.two_passes import TwoPassOptimizer, num_gradients
from qsdp.methods.optimizer_wrapper import OptimizerWrapper
from qsdp.methods.wrapped_optimizer import put_inside

_Optimizer = torch.optim.Optimizer


def prepare(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    *others: Any,
    wire: qsdp.QSDPConfig | None = None,
    method: Callable[[nn.Module, _Optimizer], _Optimizer] | None = None,
) -> tuple[Any, ...]:
    """Prepare what trains, in place of ``accelerator.prepare``, and install the quantized wire.

    ``save_state`` and ``load_state`` have the wire's state too from then on, in a file of its own.

    Args:
        accelerator: With FSDP2.
        model: To be sharded; model and optimizer may also be prepared both already.
        optimizer: A plain one, or one of qsdp's, of the parameters that ``model`` has now.
        others: Loaders and schedulers.
        wire: What is sent; None takes the defaults, 8 bits both ways.
        method: Makes an optimizer of the model and its optimizer, such as
            ``lambda model, base: qsdp.CrAM(model, base)``.

    Returns:
        Model, optimizer and others, prepared, in this order, and the wire's ``Handle``.

    Raises:
        ValueError: This is not one new model with its optimizer and FSDP2; or as ``qsdp.install``.
    """
    _check(accelerator, model, optimizer, others)
    inner = getattr(optimizer, "optimizer", optimizer)
    if method is not None and isinstance(inner, OptimizerWrapper):
        raise ValueError(f"method would wrap a {type(inner).__name__}: leave out one of the two.")
    if isinstance(optimizer, AcceleratedOptimizer):
        rest = [accelerator.prepare(each) for each in others]
    else:
        model, optimizer, *rest = accelerator.prepare(model, optimizer, *others)
    inner = inner if method is None else method(model, inner)
    handle = qsdp.install(model, wire)
    put_inside(optimizer, inner)
    if isinstance(inner, OptimizerWrapper):
        inner.share_support(handle.set_support)
    _hook_checkpoints(accelerator, model, handle)
    return model, optimizer, *rest, handle


def _check(accelerator: Accelerator, model: Any, optimizer: Any, others: Any) -> None:
    """Raise ValueError for what cannot be prepared, before anything is."""
    if not accelerator.is_fsdp2:
        kind = accelerator.distributed_type.name
        raise ValueError(
            f"the accelerator trains with {'FSDP1' if kind == 'FSDP' else kind}: make it with "
            "fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2), and start it on several "
            "GPUs with torchrun or accelerate launch (on CPUs Accelerate takes DDP)."
        )
    kinds = [isinstance(each, _Optimizer) - isinstance(each, nn.Module) for each in others]
    if not isinstance(model, nn.Module) or not isinstance(optimizer, _Optimizer) or any(kinds):
        given = ", ".join(type(each).__name__ for each in (model, optimizer, *others))
        raise ValueError(f"{given} are given: give one model, its optimizer, then what is neither.")
    if passes_of(model):
        raise ValueError(f"{type(model).__name__} has the wire already: prepare it once.")
    is_prepared = isinstance(optimizer, AcceleratedOptimizer)
    if is_prepared != getattr(model, "_is_accelerate_prepared", False):
        raise ValueError(
            f"only the {'optimizer' if is_prepared else 'model'} of the two is prepared: give both "
            "as accelerator.prepare has returned them, or both as they were."
        )


def _hook_checkpoints(accelerator: Accelerator, model: Any, handle: qsdp.Handle) -> None:
    """Put the wire's state into ``accelerator``'s checkpoints, as long as ``model`` is there."""
    model._qsdp_handle = handle  # hooks that held it would keep the model
    name = f"qsdp_{[*map(id, accelerator._models)].index(id(model))}"
    held = weakref.ref(model)

    def save(models: Any, weights: Any, folder: str) -> None:
        if (model := held()) is not None and passes_of(model):
            path = Path(folder, name)
            path.mkdir(exist_ok=True)
            save_wire(model._qsdp_handle, path, is_writer=dist.get_rank() == 0)

    def load(models: Any, folder: str) -> None:
        if (model := held()) is not None and passes_of(model):
            load_wire(model._qsdp_handle, Path(folder, name))

    weakref.finalize(model, accelerator.register_save_state_pre_hook(save).remove)
    weakref.finalize(model, accelerator.register_load_state_pre_hook(load).remove)


class StepPasses:
    """The passes of each batch: forward and backward, and ``CrAM``'s or ``SAM``'s second ones.

    Where gradients are whole these run all micro-batches of the step once more, on the same inputs
    and random numbers.
    """

    def __init__(
        self, accelerator: Accelerator, model: Any, optimizer: Any, loss_of: Callable[[Any], Tensor]
    ) -> None:
        """Take what ``prepare`` has returned, and what makes the loss of a batch."""
        self.accelerator, self.model, self.loss_of = accelerator, model, loss_of
        self.optimizer, self._kept = getattr(optimizer, "optimizer", optimizer), MicroBatches()

    def run(self, batch: Any) -> Tensor:
        """Run the passes of ``batch``, inside ``accelerator.accumulate``, and return its loss."""
        accelerator, kept = self.accelerator, self._kept

        def once() -> Tensor:
            loss = self.loss_of(kept.prepared(lambda: batch, accelerator.device))
            accelerator.backward(loss)
            return loss.detach()

        if not isinstance(self.optimizer, TwoPassOptimizer):
            return once()
        loss = kept.first(once, lambda: None)
        if accelerator.sync_gradients:
            with self.optimizer.second_pass(accelerator.scaler):
                kept.again(accelerate_sync(accelerator, self.model), accelerator.device)
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Any:
        """Clip gradients that are whole, at twice ``max_norm`` where CrAM+ has added two."""
        if not self.accelerator.sync_gradients:
            return None
        max_norm *= num_gradients(self.optimizer)
        return self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
