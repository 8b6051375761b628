"""AC/DC and gradual magnitude pruning: training under masks that change at certain steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsdp.common.rank_agreement import warn
from qsdp.common.user_errors import names_for_user
from qsdp.compat.resharding import reshard_all
from qsdp.methods.clip_grad import check_max_norm, scale_grads_
from qsdp.methods.mask_state import (
    MASK,
    check_masks,
    mask_of,
    masked_names_by_id,
    split_masks,
    step_without_masks,
)
from qsdp.methods.optimizer_wrapper import OptimizerWrapper
from qsdp.methods.rollback import rollback_on_exception, snapshot_buffers_and_grads
from qsdp.methods.weak_hooks import register_weak_hook
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import local_shard
from qsdp.sparsity.masks import keep_masks
from qsdp.sparsity.prunable import Prunable
from qsdp.sparsity.prune_and_round import prune_by_mask_

_STEP = "masked_step"
_PLAN = "mask_plan"
_NAMES = "mask_names"


class MaskedOptimizer(OptimizerWrapper):
    """A masked optimizer: steps of a base in which pruned weights stay exactly zero.

    The masks are bool tensors of the parameters' own kind (DTensors under FSDP2) in the optimizer's
    state: ``state_dict`` and DCP save them, and restore them on any number of ranks.

    ``step`` is called after the backward pass, as any optimizer's. It masks the gradients, clips
    them, lets the base step, and sets pruned weights to +0.0 again. When a gradient, or the loss
    that a closure returns (as for ``CrAM``), is not finite on any rank, weights and moments stay,
    and with a closure buffers and gradients; the step counts, ``skipped_steps`` counts it, and
    ``last_bad`` says why. Masks change at the end of a step, so that the next forward pass sees
    them. Frozen weights could not grow back: they are neither pruned nor counted while they are.
    What is unfrozen has the mask that it had, if any, until masks are renewed or lifted; after DCP
    has loaded the state while it was frozen, it has none.

    ``last_grad_norm`` is the norm of the (masked) gradient of the last step, before clipping;
    ``last_target`` is what the masks were renewed to after the last step; None if they stayed.
    ``before_pruning``, when set, is called just before masks are renewed: the weights are still
    dense.
    """

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: torch.optim.Optimizer,
        *,
        plan: str,
        max_norm: float | None,
        prunable: Sequence[str] | None,
    ) -> None:
        """``plan`` says when the masks change and to what: a state goes with its own alone."""
        if max_norm is not None:
            check_max_norm(max_norm)
        super().__init__(model, base_optimizer, prunable, {_STEP: 0, _PLAN: plan})
        self._plan = plan
        self.max_norm = max_norm
        self._loaded_masks: list[tuple[Tensor, Tensor]] = []
        self.before_pruning: Callable[[], None] | None = None
        if not self.prunable.names:
            warn(
                f"{type(self).__name__} prunes nothing, because all of its prunable weights are "
                "frozen and could not grow back: unfreeze some before masks are renewed, prune "
                "them before training by qsdp.oneshot.compress_, or take CrAM, which compresses "
                "frozen weights in its second pass."
            )

    def attach(self) -> None:
        """Hook on to the base, and remember the plan of masks in its groups."""
        super().attach()
        self._remember(_PLAN, self._plan)  # an earlier wrapper's may be there
        register_weak_hook(self.base.register_load_state_dict_pre_hook, self._extract_masks)

    @property
    def prunable(self) -> Prunable:
        """The parameters that may be pruned: those that are trained now."""
        return super().prunable.trained()

    @property
    def num_steps(self) -> int:
        """Steps taken, skipped ones included; saved in ``state_dict``."""
        return int(self._recall(_STEP))

    @property
    def pruned(self) -> float:
        """The fraction of the prunable weights that the masks prune now."""
        return self._pruned_fraction(self.num_steps) if self.prunable.names else 0.0

    def masks(self) -> dict[str, Tensor]:
        """Which weights are trained, by name: bool, DTensors where the parameters are."""
        prunable = self.prunable
        pairs = zip(prunable.names, prunable.parameters, strict=True)
        return {name: mask_of(self.state, parameter) for name, parameter in pairs}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a collective when the model is sharded.

        Args:
            closure: Runs forward and backward and returns the loss, as torch's optimizers take it;
                without one the gradients are there already.

        Raises:
            RuntimeError: The base optimizer has other parameters than the model; FSDP2 keeps
                its weights gathered after the backward pass; or ranks are not at the same step.
        """
        if self._leaves_steps_out:
            return None
        facts: dict[str, Any] = {"step": self.num_steps, "closure": closure is not None}
        facts["state"] = bool(self.state)
        if not self.state:
            facts["learning rates of 0"] = self._has_no_rate()
        self.meet(self._check_begin, **facts)
        self._check_all_are_masked()
        loss, self.last_bad = None, None
        restore = _do_nothing if closure is None else snapshot_buffers_and_grads(self.model)
        with rollback_on_exception(self.model, restore):
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if self._only_makes_state():
                self.base.step()
                self._make_masks()
                return loss
            if not self._take_step(loss):
                restore()
        self._remember(_STEP, self.num_steps + 1)
        self.last_target = None
        self._update_masks(self.num_steps)
        reshard_all(self.model)
        return loss

    def _check_begin(self) -> None:
        """Raise RuntimeError if the step cannot be taken, or a later one could not."""
        self.check_reshards()

    def _check_all_are_masked(self) -> None:
        """Say which of the parameters that are trained now no mask prunes, where one should."""
        pairs = zip(self.prunable.names, self.prunable.parameters, strict=True)
        without = [name for name, p in pairs if MASK not in self.state.get(p, {})]
        if not without or not self.num_steps or not self._is_masked(self.num_steps):
            return
        if not any(MASK in self.state.get(p, {}) for p in self._tracked.prunable.parameters):
            raise RuntimeError(
                f"the masks of {type(self).__name__} are gone from the optimizer's state, and with "
                "them what was pruned: load the state_dict() of before."
            )
        warn(
            f"from now on {type(self).__name__} trains {names_for_user(without)}, and prunes "
            "nothing of it before masks are renewed the next time."
        )

    def _take_step(self, loss: Any) -> bool:
        """Let the base step under the masks. Returns whether gradient and ``loss`` are finite."""
        is_masked = self._is_masked(self.num_steps)
        if is_masked:
            for parameter in self._tracked.prunable.parameters:
                if parameter.grad is not None:
                    mask = local_shard(mask_of(self.state, parameter)).values
                    prune_by_mask_(local_shard(parameter.grad).values, mask)
        norm = self.last_grad_norm = self._grad_norm(loss)
        if not math.isfinite(norm):
            self._count_skipped(loss)
            return False
        if self.max_norm is not None:
            scale_grads_(self.parameters(), self.max_norm, norm)
        step_without_masks(self.base)
        self._make_masks()
        if is_masked:
            self._apply_masks()
        return True

    def _is_masked(self, step: int) -> bool:
        """Whether optimizer step number ``step``, the first being 0, is taken under the masks."""
        raise NotImplementedError

    def _pruned_fraction(self, steps_done: int) -> float:
        """The fraction that is pruned when ``steps_done`` steps are done."""
        raise NotImplementedError

    def _update_masks(self, steps_done: int) -> None:
        """Renew or lift the masks when ``steps_done`` steps are done, if it is time to."""
        raise NotImplementedError

    def _renew_masks(self, target: Compression) -> None:
        """Keep what ``target`` keeps of the weights as they are, and set the others to zero."""
        self.last_target = target
        try:
            if self.before_pruning is not None:
                self.before_pruning()
        finally:  # the step counts as taken: its masks are due whatever happens there
            self._make_new_masks(target)

    def _make_new_masks(self, target: Compression) -> None:
        reshard_all(self.model)
        self._make_masks()
        shards = self.prunable.shards()
        masks = keep_masks(shards, target, self.prunable.dims)
        for parameter, mask in zip(self.prunable.parameters, masks, strict=True):
            local_shard(mask_of(self.state, parameter)).values.copy_(mask)
        self._apply_masks()
        self._announce_support()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, which goes by number, with the names of the masks."""
        masked = {id(key) for key, state in self.state.items() if MASK in state}
        named, own = self._tracked.prunable_ids, [*map(id, self.parameters())]
        names = [named[key] for key in own if key in masked and key in named]
        return {**super().state_dict(), _NAMES: names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary of this wrapper, or of a bare base optimizer.

        Raises ValueError if its masks were made by another plan or are of other parameters.
        """
        self._tracked.refresh()
        super().load_state_dict(state_dict)
        self._announce_support()

    def _announce_support(self) -> None:
        """Tell who wants to know which weights are not zero; a collective there."""
        if self._on_support_change is not None:
            self._tracked.refresh()
            masks = {
                p: local_shard(mask_of(self.state, p)).values for p in self.prunable.parameters
            }
            self._on_support_change(masks if self._is_masked(self.num_steps) else None)

    def _lift_masks(self) -> None:
        """Train all weights again, from zero where they were pruned."""
        for state in self.state.values():
            if MASK in state:
                local_shard(state[MASK]).values.fill_(True)
        self._announce_support()

    def _apply_masks(self) -> None:
        for parameter in self._tracked.prunable.parameters:
            # The base steps what has a gradient, also where that was frozen since.
            if parameter.requires_grad or parameter.grad is not None:
                prune_by_mask_(
                    local_shard(parameter).values,
                    local_shard(mask_of(self.state, parameter)).values,
                )

    def _make_masks(self) -> None:
        """Give every prunable parameter a mask that keeps all, where it has none."""
        for parameter in self.parameters():
            self.state[parameter]  # DCP loads the states of all parameters or of none
        for parameter in self.prunable.parameters:
            if MASK not in self.state[parameter]:
                self.state[parameter][MASK] = torch.ones_like(parameter, dtype=torch.bool)

    def _extract_masks(
        self, _: torch.optim.Optimizer, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """Load the masks past torch; see ``split_masks``."""
        if self._recall(_PLAN) != self._plan:
            return state_dict  # another one has wrapped the base since
        first = state_dict["param_groups"][0]
        plan = first.get(_PLAN, self._plan)
        if plan != self._plan:
            raise ValueError(
                f"the state was made under {plan}, but this {type(self).__name__} follows "
                f"{self._plan}, whose phases have other masks: make it as it was."
            )
        self._loaded_masks = []
        parameters = self.parameters()
        rest, masks = split_masks(state_dict, parameters)
        masked = {id(parameter) for parameter, _ in masks}
        # Before the first step there are none.
        if masked or self._is_masked(int(first.get(_STEP, 0))):
            check_masks(
                masked,
                state_dict.get(_NAMES),
                masked_names_by_id(self._tracked.prunable, parameters),
                [*masked_names_by_id(self.prunable, parameters).values()],
                type(self).__name__,
            )
        self._loaded_masks = masks
        return rest

    def _on_load(self, base: torch.optim.Optimizer) -> None:
        super()._on_load(base)
        for parameter, mask in getattr(self, "_loaded_masks", []):
            # A copy, as torch makes one of everything else that it loads.
            self.state[parameter][MASK] = mask.to(parameter.device, torch.bool, copy=True)
        self._loaded_masks = []


def _do_nothing() -> None:
    """There was no pass."""
