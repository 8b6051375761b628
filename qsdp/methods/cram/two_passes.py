"""Optimizers of two passes, the second at compressed weights, in loops that own their backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from qsdp.common.model_structure import unique_tensors
from qsdp.compat.fsdp_state import with_enclosing_roots
from qsdp.compat.installed_wire import rewind_point
from qsdp.compat.interrupted_passes import abandon_interrupted_pass
from qsdp.compat.parameter_group import groups_have_pending_gradients
from qsdp.compat.resharding import reshard_all
from qsdp.methods.clip_grad import scale_grads_
from qsdp.methods.cram.compressed_point import add_grads, at_compressed_point, take_grad
from qsdp.methods.cram.loss_scale import LossScale, check_loss_scale, loss_scale
from qsdp.methods.optimizer_wrapper import OptimizerWrapper
from qsdp.methods.rollback import rollback_on_exception, snapshot_buffers_and_grads
from qsdp.methods.wrapped_optimizer import wrapped_by
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import local_shard

STEP = "cram_step"
_TINY = 1e-12
_MARK = "version_after_second_pass"


class TwoPassOptimizer(OptimizerWrapper):
    """An optimizer whose steps take two passes: what ``CrAM`` does around the second of them.

    Its ``__init__`` sets what is declared here.
    """

    rho: float
    plus: bool
    normalize: bool
    sparse_grad: bool
    max_norm: float | None
    _second_pass = ""
    """``done`` or ``not finite`` between a second pass and its step."""
    _left_grads = False
    _is_inside = False

    @property
    def num_steps(self) -> int:
        """Steps with a closure and second passes, skipped ones too; saved in ``state_dict``."""
        return self._recall(STEP)

    def _next_target(self) -> Compression:
        """The target of the next step, the same on all ranks."""
        raise NotImplementedError

    @contextmanager
    def second_pass(self, scale: LossScale = None) -> Iterator[None]:
        """Second pass in a loop that owns its backward pass, in place of a closure.

        The gradient of the first pass is there, of all micro-batches, reduced. Inside, forward and
        backward pass run once more on the same data, all micro-batches again; ``step()`` follows,
        without a closure::

            model(x).backward()
            with optimizer.second_pass():
                model(x).backward()
            optimizer.step()
            optimizer.zero_grad()

        This is ``step(closure)``, bit for bit, where losses are finite: of these only gradients
        tell. A collective on entry when the model is sharded. At the end ``.grad`` is what the base
        is to step with, and may be clipped; CrAM+ adds two gradients, so clip it at twice the norm.
        Where the gradient of the first pass is not finite the second changes nothing, and no step
        is taken. An exception inside is passed on, and leaves all as it was on entry.

        With ``torch.amp.GradScaler``, give it: ``scaler.scale(loss).backward()`` in both passes,
        ``scaler.step(optimizer)`` after them. A step that it leaves out counts as skipped.

        Args:
            scale: What losses are multiplied by in both passes: a number above 0, or the
                GradScaler. None is 1.

        Raises:
            ValueError: ``scale`` is something else.
            RuntimeError: There is no gradient of a first pass, or one that was not reduced, is
                unscaled already, or is of another second pass; a loss that was made outside is sent
                backward inside; no backward pass is run inside, or its gradients are not reduced;
                this is one inside another; or as ``step``.
        """
        own = wrapped_by(self)
        if own is not self:
            with own.second_pass(scale):
                yield
            return
        target, factor = self._next_target(), loss_scale(scale)
        facts: dict[str, Any] = {"step": self.num_steps, "target": str(target), "scale": factor}
        has_first = self.meet(
            lambda: self._check_first_pass(scale, factor), has_news=self._has_grads(), **facts
        )
        if not has_first:
            raise RuntimeError(
                "second_pass() is entered without gradients of a first pass: run forward and "
                "backward before it, too."
            )
        factor = float(factor)
        self._second_pass, self.last_target, self.last_bad = "", None, None
        parameters = unique_tensors(self.parameters())
        with torch.no_grad():
            norm = self.last_grad_norm = self._grad_norm() / factor
            grads = [take_grad(parameter) for parameter in parameters]
        is_finite = math.isfinite(norm)

        def back_to_the_first() -> None:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad

        self._is_inside = True
        try:
            with rollback_on_exception(self.model, back_to_the_first):
                if is_finite:
                    with self._compressed(parameters, grads, target, norm, factor):
                        yield
                        self._check_second_pass(parameters, grads)
                else:
                    undo = snapshot_buffers_and_grads(self.model, parameters)
                    rewind = rewind_point(self.model)
                    try:
                        yield
                    finally:
                        undo()
                    rewind()
                    back_to_the_first()
        finally:
            self._is_inside = False
        if not is_finite:
            self._count_skipped(None, ", in the first pass")
            self._second_pass = "not finite"
        else:
            if self.plus:
                with torch.no_grad():
                    add_grads(parameters, grads)
            self.last_target = target
            self._second_pass = "done"
            self.skipped_steps += 1  # until the step is taken
            self.last_bad = "something after the second pass, which no step has followed"
            self.last_grad_norm = math.nan
        left = self._grads()
        for grad in left:
            setattr(grad, _MARK, _version(grad))
        self._left_grads = bool(left)
        self._remember(STEP, self.num_steps + 1)
        reshard_all(self.model)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; see ``OptimizerWrapper.zero_grad``."""
        super().zero_grad(set_to_none)
        if not self._leaves_steps_out:
            wrapped_by(self)._second_pass = ""

    def _step_on_both(self) -> None:
        """Let the base step on what both passes have left in ``.grad``, once."""
        was, self._second_pass = self._second_pass, ""
        if was == "not finite":
            return  # and is counted
        self.skipped_steps -= 1
        self.last_bad = None
        if self._takes(self._grad_norm(), None):
            self.base.step()
            reshard_all(self.model)

    def _check_outside(self) -> None:
        """Raise RuntimeError inside of a second pass."""
        if self._is_inside:
            raise RuntimeError(
                f"{type(self).__name__} is in a second pass, where weights are compressed: leave "
                "the with statement of second_pass() before step() or another one."
            )

    def _check_step(self) -> None:
        """Raise RuntimeError where a step would not be that of the second pass before it."""
        self._check_outside()
        is_theirs = any(hasattr(grad, _MARK) for grad in self._grads())
        if self._second_pass and self._left_grads and not is_theirs:
            raise RuntimeError(
                f"the gradients that second_pass() has left are gone as {type(self).__name__}."
                "step() begins, and others would be those of a plain step: run both passes again."
            )

    def _check_passes(self) -> None:
        """Raise RuntimeError where passes would not show what they are taken at."""
        self._check_outside()
        self.check_reshards()
        for whole in with_enclosing_roots(self.model):
            abandon_interrupted_pass(whole)

    def _check_first_pass(self, scale: LossScale, factor: float | str) -> None:
        """Raise an error if a second pass cannot be entered."""
        if self._leaves_steps_out:
            raise RuntimeError(
                "second_pass() is entered where accelerate accumulates gradients: enter it where "
                "accelerator.sync_gradients is True."
            )
        self._check_passes()
        self._check_reduced("begins")
        check_loss_scale(scale, factor, [self, self.base])
        grads = self._grads()
        # A GradScaler leaves steps out, after which gradients may be cleared where they stand.
        is_left = self._second_pass and not isinstance(scale, torch.amp.GradScaler)
        if grads and all(
            hasattr(grad, _MARK) and (is_left or getattr(grad, _MARK) == _version(grad))
            for grad in grads
        ):
            raise RuntimeError(
                "second_pass() follows another one, whose gradients are still there: take its step "
                f"or call {type(self).__name__}.zero_grad(), and run the first pass again."
            )

    def _check_second_pass(
        self, parameters: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> None:
        """Raise RuntimeError if the second pass ends without what it is for."""
        self._check_reduced("ends")
        had_some = any(grad is not None for grad in grads)
        if had_some and all(parameter.grad is None for parameter in parameters):
            raise RuntimeError(
                "second_pass() ends without a gradient: run forward and backward inside, as before "
                "it."
            )

    def _check_reduced(self, when: str) -> None:
        """Raise RuntimeError if gradients were not reduced."""
        if groups_have_pending_gradients(self.model):
            raise RuntimeError(
                f"gradients of micro-batches were not reduced as second_pass() {when}: synchronise "
                "gradients in the backward pass of the last micro-batch."
            )

    def _compressed(
        self,
        parameters: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        target: Compression,
        norm: float,
        factor: float = 1.0,
    ) -> AbstractContextManager[None]:
        """The second pass stands inside; ``grads`` of the first, of ``norm`` times ``factor``."""
        scale = self.rho / (norm + _TINY) if self.normalize else self.rho
        return at_compressed_point(
            self.model,
            parameters,
            grads,
            scale=scale / factor,
            prunable=self.prunable,
            target=target,
            sparse_grad=self.sparse_grad,
            on_support_change=self._on_support_change,
        )

    def _takes(self, norm: float, loss: Any) -> bool:
        """Whether a gradient of ``norm``, of both passes, is stepped with; clips it."""
        self.last_grad_norm = norm
        if not math.isfinite(norm):
            self._count_skipped(loss, ", in the second pass")
            return False
        if self.max_norm is not None:
            scale_grads_(self.parameters(), self.max_norm * num_gradients(self), norm)
        return True


def num_gradients(optimizer: object) -> int:
    """How many gradients a step of ``optimizer`` adds up, and how often the norm to clip at counts.

    They are two in CrAM+, and one in any other.
    """
    return 2 if isinstance(optimizer, TwoPassOptimizer) and optimizer.plus else 1


def _version(grad: Tensor) -> int:
    """How often ``grad`` was edited."""
    return local_shard(grad).values._version
