"""torchtitan: the wire in the spec of a model, and its Trainer with both passes of CrAM and SAM."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchtitan.components.metrics import BaseLogger
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from qsdp.config import QSDPConfig
from qsdp.fsdp.sharding_function import ShardingFunction
from qsdp.methods.cram.run_again import MicroBatches
from qsdp.methods.cram.two_passes import TwoPassOptimizer, num_gradients
from qsdp.methods.made_method import check_method, made_by
from qsdp.methods.optimizer_wrapper import OptimizerWrapper

Method = Callable[[nn.Module, torch.optim.Optimizer], OptimizerWrapper]


def wrap_spec(
    spec: ModelSpec, wire: QSDPConfig | None = None, method: Method | None = None
) -> ModelSpec:
    """Make a spec whose ``parallelize_fn`` installs the wire after that of ``spec``.

    Args:
        spec: Of a model's registry; it stays as it is.
        wire: How the model is to travel.
        method: Makes an optimizer of qsdp of the model and the optimizer that torchtitan has built.
            It tells the wire of its masks. CrAM and SAM need ``QSDPTrainer``.

    Returns:
        The spec, for one model: its ``parallelize_fn.handle`` is the wire's. What it cannot be
        used with it refuses by a ValueError: CUDA graphs, and ``method`` with pipelines or several
        optimizers.
    """
    check_method(method)
    parallelize = _Parallelize(spec.parallelize_fn, wire)

    def after_build(optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        if spec.post_optimizer_build_fn is not None:
            spec.post_optimizer_build_fn(optimizers, model_parts, parallel_dims)
        if method is None or parallelize._handle is None:  # a seed checkpoint is of a whole model
            return
        if parallel_dims.pp_enabled or len(optimizers.optimizers) != 1:
            raise ValueError(
                "an optimizer of qsdp wraps one optimizer of a whole model: choose param_groups of "
                "one optimizer_name, and no pipeline."
            )
        own = made_by(method, model_parts[0], optimizers.optimizers[0])
        own.share_support(parallelize.handle.set_support)
        optimizers.optimizers[0] = own

    return dataclasses.replace(
        spec, parallelize_fn=parallelize, post_optimizer_build_fn=after_build
    )


class QSDPTrainer(Trainer):
    """torchtitan's Trainer for a spec of ``wrap_spec``.

    The wire's state stands in checkpoints, as ``wire``. Trackers get ``wire_sent_mb``, what this
    process has sent so far, and ``pruned``. With CrAM or SAM all micro-batches of a step run once
    more, before gradients are clipped: in CrAM+ at twice ``training.max_norm``.
    """

    def __init__(self, config: Trainer.Config) -> None:
        """Make the Trainer; a ValueError says that its spec is none of ``wrap_spec``."""
        spec: Any = config.model_spec
        if not isinstance(spec.parallelize_fn, _Parallelize):
            raise ValueError("the model_spec has no wire: give that of wrap_spec(spec, wire).")
        super().__init__(config)
        self.wire: ShardingFunction = spec.parallelize_fn
        self._micro_batches, self._num_run = MicroBatches(), 0
        self._own = next((o for o in self.optimizers if isinstance(o, OptimizerWrapper)), None)
        self.metrics_processor.logger = _Logger(self.metrics_processor.logger, self)
        if self.checkpointer.enable and not config.checkpoint.create_seed_checkpoint:
            self.checkpointer.states["wire"] = _Packed(self.wire)

    def train_step(self, data_iterator: Any) -> None:
        """Take a step, and clip the sum of two gradients at twice the norm."""
        training, self._micro_batches, self._num_run = self.config.training, MicroBatches(), 0
        given = training.max_norm
        training.max_norm *= num_gradients(self._own)
        try:
            super().train_step(data_iterator)
        finally:
            training.max_norm = given

    def forward_backward_step(self, **arguments: Any) -> torch.Tensor:
        """Run a micro-batch, and after the last one all of them at CrAM's second point."""
        run, kept = super().forward_backward_step, self._micro_batches
        if not isinstance(self._own, TwoPassOptimizer):
            return run(**arguments)

        def once() -> torch.Tensor:
            return run(**kept.prepared(lambda: arguments, self.device))

        loss: torch.Tensor = kept.first(once, lambda: None)
        self._num_run += 1
        if self._num_run == self.gradient_accumulation_steps:
            counts = self.state_dict()  # of tokens seen
            with self._own.second_pass():
                kept.again(lambda _: None, self.device)
            self.load_state_dict(counts)
        return loss


class _Parallelize(ShardingFunction):
    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        training = kwargs.get("training")
        if training is not None and not training.disable_cuda_graphs:
            raise ValueError(
                "training.disable_cuda_graphs is False, where a graph would draw the same random "
                "numbers in all steps: set it to True."
            )
        return super().__call__(model, *args, **kwargs)


class _Packed:
    """The wire's state as one value, whose size DCP need not know before it loads."""

    def __init__(self, wire: ShardingFunction) -> None:
        self._wire = wire

    def state_dict(self) -> dict[str, bytes]:
        file = io.BytesIO()
        torch.save(self._wire.state_dict(), file)
        return {"state": file.getvalue()}

    def load_state_dict(self, state: dict[str, bytes]) -> None:
        self._wire.load_state_dict(torch.load(io.BytesIO(state["state"]), weights_only=True))


class _Logger(BaseLogger):
    """All that torchtitan logs to, with what the wire has sent and what is pruned."""

    def __init__(self, inner: BaseLogger, trainer: QSDPTrainer) -> None:
        self._inner, self._trainer, self.close = inner, trainer, inner.close

    def log(self, metrics: dict[str, Any], step: int) -> None:
        own, sent = self._trainer._own, self._trainer.wire.handle.traffic.megabytes()
        self._inner.log({**metrics, **sent, **({"pruned": own.pruned} if own else {})}, step)
