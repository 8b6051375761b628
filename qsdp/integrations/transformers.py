"""transformers: the quantized wire, and methods such as CrAM, under ``Trainer`` and TRL's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

import qsdp
from qsdp.compat.installed_wire import passes_of
from qsdp.compat.interrupted_passes import abandon_passes
from qsdp.fsdp.wire_file import load_wire, save_wire
from qsdp.methods.cram.run_again import MicroBatches, accelerate_sync, counting_aside
from qsdp.methods.cram.two_passes import TwoPassOptimizer, num_gradients
from qsdp.methods.made_method import check_clipped_once, check_method, check_whole_batch, made_by
from qsdp.methods.wrapped_optimizer import put_inside

Method = Callable[[torch.nn.Module, torch.optim.Optimizer, int], torch.optim.Optimizer]
_Base: Any = object  # what the mixin does not have is that of the Trainer after it


class QSDPMixin(_Base):
    """The quantized wire, and a method, for a ``Trainer``: ``class T(QSDPMixin, SFTTrainer)``.

    ``handle`` is the wire's ``qsdp.Handle``, None until ``train()``. ``max_grad_norm`` clips what
    the optimizer steps with in the end: at twice where CrAM+ adds two gradients.
    """

    def __init__(
        self,
        *args: Any,
        wire: qsdp.QSDPConfig | None = None,
        method: Method | None = None,
        exact_evaluation: bool = False,
        **kwargs: Any,
    ) -> None:
        """Make a trainer of ``args`` and ``kwargs``.

        Args:
            wire: What is sent; None takes the defaults, 8 bits both ways.
            method: Makes an optimizer of the model, its optimizer and the number of steps, such as
                ``lambda model, base, steps: qsdp.CrAM(model, base)``, at each ``train()``.
            exact_evaluation: Evaluate exact weights, not those that training gathers.
        """
        check_method(method)
        self.wire, self.method, self.exact_evaluation = wire, method, exact_evaluation
        self.handle: Any = None
        self._made: Any = None
        self._micro_batches = MicroBatches()
        super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__[: cls.__mro__.index(QSDPMixin)]:
            raise TypeError(f"{cls.__name__} has QSDPMixin after its trainer: name it first.")

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_batches = MicroBatches()
        abandon_passes(self.model)  # Trainer clears gradients, but not those that wait in FSDP2
        if self.handle is not None and not passes_of(self.model):
            self.handle = None  # of a model that model_init has replaced
        if self._made is not None:  # it counts steps: base and method begin anew
            self.optimizer: Any = None
            self._made = None
        return super()._inner_training_loop(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Install the wire and make the method: model and optimizer have just been prepared."""
        model = self.accelerator._models[-1]
        if not any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} is not sharded by FSDP2: set fsdp=True, without version 1 "
                "in fsdp_config, and start with torchrun on GPUs (on CPUs Accelerate takes DDP)."
            )
        if self.method is not None:
            made = made_by(self.method, model, self.optimizer.optimizer, num_training_steps)
            check_whole_batch(made, self.accelerator)
            if self.args.max_grad_norm > 0:
                trainers = f"Trainer at max_grad_norm {self.args.max_grad_norm}"
                check_clipped_once(made, trainers, "leave out the first, or set the second to 0")
            put_inside(self.optimizer, made)
            self._made = made
        if self.handle is None:
            self.handle = qsdp.install(model, self.wire)
        if self._made is not None:
            self._made.share_support(self.handle.set_support)
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Take ``Trainer``'s step, and where gradients are whole the second pass, of all."""
        run = partial(super().training_step, model, inputs, num_items_in_batch)
        if not isinstance(self._made, TwoPassOptimizer):
            return run()
        num = "current_gradient_accumulation_steps"
        with self._micro_batches.kept_with_grads(model, self._made):
            loss = self._micro_batches.first(run, partial(setattr, self, num, getattr(self, num)))
            if self.accelerator.sync_gradients:
                with counting_aside(self), self._made.second_pass(self.accelerator.scaler):
                    set_is_last = accelerate_sync(self.accelerator, model)
                    self._micro_batches.again(set_is_last, self.args.device)
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepare = partial(super()._prepare_inputs, inputs)
        return self._micro_batches.prepared(prepare, self.args.device)

    def _clip_grad_norm(self, model: Any) -> Any:
        given = self.args.max_grad_norm
        self.args.max_grad_norm *= num_gradients(self._made)
        try:
            return super()._clip_grad_norm(model)
        finally:
            self.args.max_grad_norm = given

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_wire(self.handle, Path(output_dir), is_writer=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_wire(self.handle, Path(checkpoint))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log beside losses of training what this rank has sent, and what a method does."""
        if self.handle is not None and logs.keys() & {"loss", "train_loss"}:
            logs |= self.handle.traffic.megabytes()
            if self._made is not None:
                logs |= {name: getattr(self._made, name) for name in ("pruned", "skipped_steps")}
        if not self._micro_batches.is_again:
            super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; what is sent for it does not count as training's."""
        if self.handle is None:
            return super().evaluation_loop(*args, **kwargs)
        weights = self.handle.exact() if self.exact_evaluation else nullcontext()
        with self.handle.traffic.paused(), weights:
            return super().evaluation_loop(*args, **kwargs)


class QSDPTrainer(QSDPMixin, Trainer):
    """``transformers.Trainer`` with the quantized wire."""
