"""Lightning: a ``parallelize_fn`` for Fabric that puts the wire on, and a callback for Trainer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature as takes
from torchmetrics import Metric

from qsdp.config import QSDPConfig
from qsdp.fsdp.install import install
from qsdp.fsdp.sharding_function import ShardingFunction
from qsdp.fsdp.whole_state import load_whole_state, whole_state
from qsdp.methods.cram.run_again import MicroBatches, counting_aside
from qsdp.methods.cram.two_passes import TwoPassOptimizer, num_gradients
from qsdp.methods.optimizer_wrapper import OptimizerWrapper
from qsdp.methods.wrapped_optimizer import unwrapped


def wrap_parallelize(fn: Callable[..., Any], wire: QSDPConfig | None = None) -> ShardingFunction:
    """Make a ``parallelize_fn`` for Fabric: ``fn(model, mesh)`` shards, and ``wire`` is put on."""
    return ShardingFunction(fn, wire)


class QSDPCallback(Callback):
    """A callback of Lightning's Trainer: the wire, and both passes of CrAM and SAM.

    It installs the wire where ``configure_model`` has sharded the module, before a checkpoint is
    loaded. The wire's state stands in checkpoints, a qsdp optimizer tells it of masks, and loggers
    get ``wire_sent_mb``, what this process has sent so far, and ``pruned``.

    With CrAM or SAM and automatic optimization all micro-batches of a step run once more, with the
    same random numbers, before gradients are clipped: in CrAM+ at twice ``gradient_clip_val``.
    Meanwhile ``is_second_pass`` is True, and nothing is logged or counted in the module's metrics,
    nor in numbers, tensors, lists and dictionaries that are its attributes.
    """

    handle: Any = None  # that of the wire, a qsdp.Handle, from the first fit on

    def __init__(self, wire: QSDPConfig | None = None) -> None:
        """``wire`` says how the model is to travel."""
        self.config, self._kept = wire, MicroBatches()
        self._model: Any = None

    @property
    def is_second_pass(self) -> bool:
        """Whether ``training_step`` runs at the weights of CrAM's or SAM's second pass."""
        return self._kept.is_again

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the wire, once for each module."""
        if self.handle is None or self.handle._is_removed or self._model() is not pl_module:
            self.handle, self._model = install(pl_module, self.config), weakref.ref(pl_module)
        self.handle.set_support(None)  # it has the masks of an earlier fit's optimizer
        if optimizer := _own_optimizer(trainer):
            optimizer.share_support(self.handle.set_support)

    def state_dict(self) -> dict[str, Any]:
        """The whole state of the wire; a collective."""
        return whole_state(self.handle) if self.handle else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it after weights, optimizer and masks, as Lightning does; a collective."""
        if self.handle is not None:  # else nothing is trained, and weights travel as they are
            load_whole_state(self.handle, state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put both passes where Lightning steps CrAM or SAM."""
        strategy: Any = trainer.strategy
        vars(strategy).pop("training_step", None)  # an earlier fit has left it, and micro-batches
        self._kept, optimizer = MicroBatches(), _own_optimizer(trainer)
        if pl_module.automatic_optimization and isinstance(optimizer, TwoPassOptimizer):
            if takes(pl_module.training_step, "dataloader_iter", explicit=True):
                raise ValueError("training_step takes dataloader_iter: let it take batches.")
            trainer.optimizers = list[Any]([_BothPasses(optimizer, trainer, self)])
            strategy.training_step = partial(self._training_step, trainer, strategy.training_step)

    def _training_step(self, trainer: Any, step: Callable[..., Any], *arguments: Any) -> Any:
        """Run a micro-batch, as callbacks and module have left it, and keep it for the second."""
        if trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            self._kept = MicroBatches()  # where Lightning clears gradients

        def run() -> Any:
            output = step(*self._kept.prepared(lambda: arguments, trainer.lightning_module.device))
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is None:
                raise ValueError("training_step has no loss for a second pass: return one.")
            if self.is_second_pass:  # Lightning itself sends back the first
                part = loss / trainer.accumulate_grad_batches
                trainer.strategy.backward(part, trainer.optimizers[0])
            return output

        return self._kept.first(run, lambda: None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log what was sent, and what is pruned."""
        pl_module.log_dict(self.handle.traffic.megabytes())
        if optimizer := _own_optimizer(trainer):
            pl_module.log("pruned", float(optimizer.pruned))

    @contextmanager
    def _unseen(self, module: LightningModule) -> Iterator[None]:
        """Inside, nothing that the module logs, or counts, lasts."""
        with ExitStack() as stack:
            for each in (module, *(m for m in module.modules() if isinstance(m, Metric))):
                stack.enter_context(counting_aside(each))
            module.__dict__["log"] = lambda *_, **__: None
            stack.callback(module.__dict__.pop, "log")
            yield


class _BothPasses(LightningOptimizer):
    """CrAM or SAM: Lightning asks it for a step, and the precision plugin does so inside."""

    def __init__(self, optimizer: Any, trainer: Any, own: QSDPCallback) -> None:
        self._cram, self._trainer, self._own, self._is_asked = optimizer, trainer, own, False
        super().__init__(optimizer)

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        trainer, optimizer, own = self._trainer, self._cram, self._own
        closure = closure or (lambda: None)
        if self._is_asked:  # by the plugin, whose closure runs both passes, and clips
            loss = closure()
            optimizer.step(**options)
            return loss

        def both_passes() -> Any:
            loss, scaler = closure(), getattr(trainer.precision_plugin, "scaler", None)
            with optimizer.second_pass(scale=scaler), own._unseen(trainer.lightning_module):
                own._kept.again(lambda _: None, trainer.lightning_module.device)
            return loss

        clip_val, self._is_asked = trainer.gradient_clip_val, True
        trainer.gradient_clip_val = clip_val and clip_val * num_gradients(optimizer)
        try:
            return trainer.strategy.optimizer_step(self, both_passes, **options)
        finally:
            trainer.gradient_clip_val, self._is_asked = clip_val, False


def _own_optimizer(trainer: Trainer) -> OptimizerWrapper | None:
    """The optimizer of qsdp; None where there are several, for one wire follows one."""
    own = [o for o in map(unwrapped, trainer.optimizers) if isinstance(o, OptimizerWrapper)]
    return own[0] if len(own) == 1 else None
