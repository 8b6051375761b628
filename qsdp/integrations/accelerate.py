"""Accelerate: the quantized wire, and methods such as CrAM, in loops around an ``Accelerator``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

import qsdp
from qsdp.compat.installed_wire import passes_of
from qsdp.fsdp.wire_file import load_wires, save_wires
from qsdp.methods.cram.run_again import MicroBatches, accelerate_sync
from qsdp.methods.cram.two_passes import TwoPassOptimizer, num_gradients
from qsdp.methods.made_method import check_clipped_once, check_method, made_by
from qsdp.methods.optimizer_wrapper import OptimizerWrapper
from qsdp.methods.wrapped_optimizer import put_inside

_Optimizer = torch.optim.Optimizer
_hooked: weakref.WeakSet[Accelerator] = weakref.WeakSet()


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
        Model, optimizer and others, prepared, in this order, and the wire's ``Handle``. The method
        itself, with its ``second_pass``, is ``optimizer.optimizer``.

    Raises:
        ValueError: This is not one new model with its optimizer and FSDP2, or ``method`` makes none
            of qsdp's; or as ``qsdp.install``.
    """
    _check(accelerator, model, optimizer, others)
    check_method(method)
    inner = getattr(optimizer, "optimizer", optimizer)
    if method is not None and isinstance(inner, OptimizerWrapper):
        raise ValueError(f"method would wrap a {type(inner).__name__}: leave out one of the two.")
    if isinstance(optimizer, AcceleratedOptimizer):
        rest = [accelerator.prepare(each) for each in others]
    else:
        model, optimizer, *rest = accelerator.prepare(model, optimizer, *others)
    inner = inner if method is None else made_by(method, model, inner)
    handle = qsdp.install(model, wire)
    put_inside(optimizer, inner)
    if isinstance(inner, OptimizerWrapper):
        inner.share_support(handle.set_support)
    model._qsdp_handle = handle  # for checkpoints
    _hook_checkpoints(accelerator)
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


def _hook_checkpoints(accelerator: Accelerator) -> None:
    """Put the wires of ``accelerator``'s models into its checkpoints, numbered as these are."""
    if accelerator in _hooked:
        return
    _hooked.add(accelerator)
    held = weakref.proxy(accelerator)
    accelerator.register_save_state_pre_hook(lambda models, _, folder: save_wires(models, folder))
    accelerator.register_load_state_pre_hook(lambda _, folder: load_wires(held._models, folder))


class StepPasses:
    """The passes of each batch: forward and backward, and ``CrAM``'s or ``SAM``'s second ones.

    Where gradients are whole these run all micro-batches of the step once more, on the same inputs
    and random numbers. An exception in a pass gives the step up, as ``reset`` does.
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

        with kept.kept_with_grads(self.model, self.optimizer):
            if not isinstance(self.optimizer, TwoPassOptimizer):
                return once()
            loss = kept.first(once, lambda: None)
            if accelerator.sync_gradients:
                with self.optimizer.second_pass(accelerator.scaler):
                    kept.again(accelerate_sync(accelerator, self.model), accelerator.device)
        return loss

    def reset(self) -> None:
        """Give the step up: drop its micro-batches so far, and their gradients."""
        self._kept.give_up(self.model, self.optimizer)

    def clip_grad_norm_(self, max_norm: float) -> Any:
        """Clip gradients that are whole, at twice ``max_norm`` where CrAM+ has added two."""
        check_clipped_once(self.optimizer, f"clip_grad_norm_ at {max_norm}", "leave one out")
        if not self.accelerator.sync_gradients:
            return None
        max_norm *= num_gradients(self.optimizer)
        return self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
