"""CrAM, the compression-aware minimizer (Peste et al., ICLR 2023, arXiv 2207.14200)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qsdp.common.model_structure import unique_tensors
from qsdp.common.rank_agreement import warn
from qsdp.common.splitmix64 import GOLDEN_GAMMA, MASK, finalize
from qsdp.common.user_errors import counted
from qsdp.compat.parameter_group import groups_have_pending_gradients
from qsdp.compat.resharding import reshard_all
from qsdp.methods.clip_grad import check_max_norm
from qsdp.methods.construct_on_all_ranks import collective_constructor
from qsdp.methods.cram.compressed_point import add_grads, clear_grads, run_closure, take_grad
from qsdp.methods.cram.two_passes import STEP, TwoPassOptimizer
from qsdp.methods.rollback import rollback_on_exception, snapshot_buffers_and_grads
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import local_shard

Target = float | str | Compression


class CrAM(TwoPassOptimizer):
    """CrAM minimizes the loss of the compressed model: min_w max_|d| <= rho L(C(w + d)).

    C keeps the largest magnitudes of the prunable set, globally and exactly, whatever the sharding,
    or by layer, in N:M patterns or in blocks, and may round what it keeps to few bits. A step
    (equation 5 of the paper; w all parameters, Q the prunable ones):

    1. A target of ``sparsity`` is drawn from (seed, step): the same on all ranks (CrAM-Multi).
    2. The closure gives the gradient g at w.
    3. w += rho * g in place, then Q is compressed to the target.
    4. The closure, on the same data, gives the gradient h at that point, with ``sparse_grad``
       masked as Q is. Rounding passes it on as it is (straight through).
    5. w is restored bit for bit; the base optimizer steps with g + h (CrAM+), or with h.

    In between it holds w, g and the mask: 8 bytes and a bit a parameter, none of it between steps.

    The closure runs forward and backward over all micro-batches, averages them as usual
    (``set_requires_gradient_sync`` or ``no_sync`` included), and returns the loss. It is called
    twice and must give the same loss for the same weights: without dropout, or with its generator
    seeded inside. ``step`` clears the gradients of the base optimizer's parameters before each call
    and after the last. To all else, the model's buffers and the gradients of what the base does not
    have, the step is one call, at w.

    When a gradient, or the loss that the closure returns (if it is a float or a tensor of one
    value), is not finite on any rank in either pass, the step changes nothing on any rank,
    ``skipped_steps`` counts it, and ``last_bad`` says what it was and in which pass. Works on plain
    modules, under DDP (where gradients alone decide) and under FSDP2;
    ``set_reshard_after_backward(False)`` is refused, because the second pass would see the weights
    of the first. Loops that run their own backward passes, and ``torch.amp.GradScaler``, have no
    closure: see ``second_pass``.

    ``last_target`` is the target drawn for the second pass of the last step; None before, and if
    the step was skipped without one. ``last_grad_norm`` is the norm of what the base optimizer was
    given in the last step, before clipping; None before, and not finite when the step was skipped.
    """

    @collective_constructor
    def __init__(
        self,
        model: nn.Module,
        base_optimizer: torch.optim.Optimizer,
        *,
        sparsity: Target | Sequence[Target] = (0.5, 0.7, 0.9),
        rho: float = 0.05,
        plus: bool = True,
        normalize: bool = False,
        sparse_grad: bool = True,
        max_norm: float | None = None,
        prunable: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        """Wrap ``base_optimizer``, made of the parameters of ``model``.

        Args:
            model: The module whose weights are trained. Where it is sharded later, the sharded
                parameters must be in the base's ``param_groups`` at the first step.
            base_optimizer: Any optimizer whose ``step()`` needs no closure.
            sparsity: One or several targets, one of which is drawn for every step: fractions of the
                prunable weights, texts like "2:4" or "0.7+4bit", or ``Compression`` objects; see
                ``Compression.of``.
            rho: Length of the ascent step, at least 0; times the gradient, unnormalised.
            plus: Add the two gradients (CrAM+), which keeps the dense model good.
            normalize: Ascend by rho * g / |g| instead, as SAM does.
            sparse_grad: Mask the second gradient as the weights were.
            max_norm: The norm that the gradient is clipped to. The sum of two gradients has about
                twice the norm of one, so that CrAM+ clips it at 2 * max_norm; plain CrAM clips at
                max_norm.
            prunable: Name patterns of the prunable set; see ``sparsity.prunable_parameters``.
            seed: Seeds the draw of the target; the same on all ranks.

        Raises:
            ValueError: A value is out of range, a prunable parameter cannot have a target's
                pattern, or the optimizer lacks prunable parameters.
            RuntimeError: Ranks that share the model give other values.
        """
        if isinstance(sparsity, str) or not isinstance(sparsity, Sequence):
            sparsity = (sparsity,)
        self.targets = tuple(Compression.of(target) for target in sparsity)
        if not self.targets:
            raise ValueError("sparsity is empty: give one or several fractions in [0, 1).")
        if not (math.isfinite(rho) and rho >= 0):
            raise ValueError(f"rho is {rho}: choose a number of at least 0.")
        if max_norm is not None:
            check_max_norm(max_norm)
        is_pruned = any(target.fraction for target in self.targets)
        is_compressed = is_pruned or any(target.bits is not None for target in self.targets)
        for name, is_given, is_heeded, wanted in (
            ("normalize", normalize, rho > 0, "a rho above 0"),
            ("sparse_grad", not sparse_grad, is_pruned, "a target that prunes"),
            ("prunable", bool(prunable), is_compressed, "a target that prunes or rounds"),
        ):
            if is_given and not is_heeded:
                raise ValueError(
                    f"{name} is given where nothing would heed it: give {wanted}, or leave it out."
                )
        super().__init__(model, base_optimizer, prunable, {STEP: 0})
        self.rho = rho
        self.plus = plus
        self.normalize = normalize
        self.sparse_grad = sparse_grad
        self.max_norm = max_norm
        self.seed = seed
        for target in self.targets:
            self.prunable.check(target)
        self._warn_of_missing()

    @property
    def pruned(self) -> float:
        """The fraction of the prunable weights that was pruned in the last step's second pass."""
        return 0.0 if self.last_target is None else self.last_target.fraction

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a collective when the model is sharded.

        An exception in the closure is passed on, and the step may be tried again: it was not begun.

        Args:
            closure: See the class. Without it the step follows a ``second_pass``; or nothing is
                done, where one was taken and there are no gradients.

        Returns:
            What the closure returned at the unperturbed weights.

        Raises:
            RuntimeError: There is neither a closure nor a second pass, or there are gradients of
                earlier micro-batches beside the closure; the base optimizer has other parameters
                than the model; FSDP2 keeps its weights gathered after the backward pass; or ranks
                are not at the same step.
        """
        if self._leaves_steps_out:
            return None
        target, name = self._next_target(), type(self).__name__
        facts: dict[str, Any] = {"step": self.num_steps, "target": str(target)}
        facts |= {"closure": closure is not None, "second pass": self._second_pass}
        if closure is None:
            self.meet(self._check_step, **facts)
            if self._second_pass:
                return self._step_on_both()
            if self.num_steps and not self._on_any_rank(self._has_grads()):
                return None  # a trainer's own call after step(closure), which left nothing to do
            is_used = bool(self.state) or not self._has_no_rate()
            if not self._on_any_rank(is_used) and self._only_makes_state():
                return self.base.step()
            raise RuntimeError(
                f"{name}.step() was called without a closure and would be a plain step of "
                f"{type(self.base).__name__}: give one that runs forward and backward, "
                f"{name}.step(closure), run both once more in {name}.second_pass() before it, or "
                f"call {name}.base.step() where a plain step is meant."
            )
        self.meet(self._check_begin, **facts)
        self._second_pass, self.last_target, self.last_bad = "", None, None
        try:
            undo = snapshot_buffers_and_grads(self.model, self.parameters())
            with rollback_on_exception(self.model, undo):
                loss, takes_step = self._compute_grads(closure, target)
                if takes_step:
                    self.base.step()
                else:
                    undo()
        finally:
            self.zero_grad()
        self._remember(STEP, self.num_steps + 1)
        reshard_all(self.model)
        return loss

    def _warn_of_missing(self) -> None:
        own, names = type(self).__name__, self._tracked.missing_names
        if names:
            warn(
                f"the base optimizer of {own} lacks {counted(len(names), 'trained parameter')} of "
                f"the model, {names[0]!r} first, and {own} leaves them where they are in the "
                "second pass and their gradients as the first pass makes them: give it one "
                "optimizer of all parameters for these to take part."
            )

    def _next_target(self) -> Compression:
        """The target of the next step."""
        return self.targets[cram_random_bits(self.seed, self.num_steps) % len(self.targets)]

    def _check_begin(self) -> None:
        """Raise RuntimeError if the two passes would not be all that the step is made of."""
        self._check_passes()
        if groups_have_pending_gradients(self.model) or any(
            local_shard(grad).values.any() for grad in self._grads()
        ):
            name = type(self).__name__
            raise RuntimeError(
                f"gradients of earlier micro-batches are there as {name}.step(closure) begins, "
                "which runs the closure twice, from no gradient each time: run all micro-batches "
                "inside the closure, or drop what is there by zero_grad() (and "
                "handle.abandon_step(), where it was not reduced yet)."
            )

    def _compute_grads(self, closure: Callable[[], Any], target: Compression) -> tuple[Any, bool]:
        """Run both passes; leave the step's gradient in place and say whether it is finite."""
        parameters = unique_tensors(self.parameters())
        clear_grads(parameters)
        loss = run_closure(closure)
        norm = self.last_grad_norm = self._grad_norm(loss)
        if not math.isfinite(norm):
            self._count_skipped(loss, ", in the first pass")
            return loss, False
        self.last_target = target
        grads = [take_grad(parameter) for parameter in parameters]
        with self._compressed(parameters, grads, target, norm):
            second_loss = run_closure(closure)
        if self.plus:
            add_grads(parameters, grads)
        return loss, self._takes(self._grad_norm(second_loss), second_loss)


def cram_random_bits(seed: int, step: int) -> int:
    """The 64 random bits by which CrAM draws a step's target, a function of (seed, step)."""
    bits = 0
    for word in (seed, step):
        bits = finalize(bits + word + GOLDEN_GAMMA & MASK)
    return bits
