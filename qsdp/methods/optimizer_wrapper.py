"""What the optimizers share: a wrapper around a base, whose parameters it knows by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qsdp.common.meshes import groups_of
from qsdp.common.model_structure import unique_tensors
from qsdp.common.rank_agreement import meet, mistakes_shared
from qsdp.compat.resharding import reshards_after_backward
from qsdp.compat.sharded_parameters import sharded_parameters
from qsdp.methods.grad_norm import norm_among
from qsdp.methods.nonfinite import name_not_finite, scalar_loss
from qsdp.methods.tracked_parameters import TrackedParameters
from qsdp.methods.weak_hooks import register_weak_hook
from qsdp.methods.wrapped_optimizer import leaves_steps_out, unwrapped, wrapped_by
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.prunable import Prunable


def _do_nothing(_: torch.optim.Optimizer) -> None:
    """A hook that shows whether there can be one."""


class SupportCallback(Protocol):
    """What an optimizer wrapper tells of its masks: those of parameters, or None for whole weights.

    ``with_grads``: gradients of pruned weights are not needed either.
    """

    def __call__(
        self, masks: Mapping[nn.Parameter, Tensor] | None, *, with_grads: bool = True
    ) -> None: ...


class OptimizerWrapper(torch.optim.Optimizer):
    """An optimizer wrapper: does something around the steps of another, and shares all it has.

    ``param_groups`` and ``state`` are the base's own objects, so learning-rate schedulers, DCP's
    ``get_optimizer_state_dict`` and the user may hold either of the two. What the wrapper must
    remember between steps stands in the parameter groups, under its own keys: ``state_dict`` and
    DCP save and restore it with them.

    Parameters are known by their names in ``model``. Where the model has others than at the last
    step, they are looked up again, and must be in the base's ``param_groups``: libraries that
    prepare a model and its optimizer together put them there.

    After a step it can be asked for

    - ``skipped_steps``: steps skipped since this object was made;
    - ``last_bad``: what was not finite in the last step, in words that are the same on all ranks;
      None if it was not skipped;
    - ``last_grad_norm``: norm of what the base was given in the last step, before clipping; None
      before. Not finite when the step was skipped;
    - ``last_target``: what the last step compressed weights to, whose threshold was looked for;
      None if it did not.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        prunable: Sequence[str] | None,
        remembered: dict[str, Any],
    ) -> None:
        """Wrap ``base``.

        Args:
            model: Has the parameters.
            base: Steps them. Of one that Accelerate or Lightning has wrapped, the one inside does.
            prunable: Name patterns of the prunable set.
            remembered: Keys of the parameter groups with initial values.

        Raises:
            ValueError: The base takes closures or sparse gradients, or lacks parameters; or it is
                a wrapped one whose gradients are scaled.
        """
        self._given, base = base, unwrapped(base)
        if not isinstance(base, torch.optim.Optimizer):
            raise ValueError(
                f"the base optimizer is a {type(base).__name__}: give a torch.optim.Optimizer."
            )
        if isinstance(base, torch.optim.LBFGS | torch.optim.SparseAdam):
            raise ValueError(
                f"the base optimizer is {type(base).__name__}: give one whose step() needs no "
                "closure and takes dense gradients, such as AdamW."
            )
        self.model = model
        self.base = base
        self.made_with: dict[str, object] = {}
        self.skipped_steps = 0
        self.last_bad: str | None = None
        self.last_grad_norm: float | None = None
        self.last_target: Compression | None = None
        self._tracked = TrackedParameters(type(self).__name__, model, base, prunable)
        self._remembered = remembered
        self._on_support_change: SupportCallback | None = None
        try:
            base.register_load_state_dict_post_hook(_do_nothing).remove()
        except AttributeError:
            raise ValueError(
                f"the base optimizer is a {type(base).__name__}, which only wraps another one: "
                "give that one, its .optimizer."
            ) from None
        # What torch makes here for this one is dropped: groups and state are the base's.
        self._unused: dict[str, Any] | None = {}
        super().__init__(self.parameters(), {})
        self._unused = None
        self.defaults = base.defaults

    def attach(self) -> None:
        """Leave marks and hooks on the base.

        Only when all ranks have agreed that this is made: what is refused leaves the base as it
        was.
        """
        # Loading gives the base new dictionaries. A hook that held this would keep the model until
        # garbage is collected.
        register_weak_hook(self.base.register_load_state_dict_post_hook, self._on_load)
        self._on_load(self.base)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's own parameter groups, as they are now."""
        return self.base.param_groups if self._unused is None else self._unused["param_groups"]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._assign("param_groups", groups)

    @property
    def state(self) -> Any:
        """The base's own state, as it is now."""
        return self.base.state if self._unused is None else self._unused["state"]

    @state.setter
    def state(self, state: Any) -> None:
        self._assign("state", state)

    def _assign(self, name: str, value: Any) -> None:
        if self._unused is None:
            setattr(self.base, name, value)
        else:
            self._unused[name] = value

    @property
    def prunable(self) -> Prunable:
        """The parameters that may be pruned, as they were found the last time."""
        return self._tracked.prunable

    @property
    def pruned(self) -> float:
        """The fraction of the prunable weights that is pruned now, or was in the last step."""
        return 0.0

    def share_support(self, tell: SupportCallback) -> None:
        """Call ``tell`` now, and whenever the weights that are not zero change.

        For instance ``Handle.set_support``, so that a pruned weight costs nothing on the wire. Now,
        too, since it may have the masks of an earlier optimizer.
        """
        own = wrapped_by(self)
        own._on_support_change = tell
        own._announce_support()

    def _announce_support(self) -> None:
        """Tell who wants to know which weights may be other than zero: here all."""
        if self._on_support_change is not None:
            self._on_support_change(None)

    def parameters(self) -> list[Tensor]:
        """All parameters of the base optimizer, in its order."""
        return self._tracked.base_parameters()

    def check_reshards(self) -> None:
        """Raise RuntimeError if FSDP2 would hide edits of the shards from the next pass."""
        if not reshards_after_backward(self.model):
            raise RuntimeError(
                f"{type(self).__name__} edits the weights between two passes, which "
                "set_reshard_after_backward(False) would hide from the second: leave it at True."
            )

    @property
    def _leaves_steps_out(self) -> bool:
        """Whether the optimizer that this was made of would do nothing now: it accumulates."""
        return leaves_steps_out(self._given)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, unless the optimizer that this was made of would accumulate them."""
        if not self._leaves_steps_out:
            super().zero_grad(set_to_none)

    def meet(
        self, check: Callable[[], None] | None, *, has_news: bool = False, **facts: object
    ) -> bool:
        """Make sure that all ranks are about to take the same step, of the parameters of now.

        A collective when sharded. ``check`` raises what else stands against it. Returns whether any
        rank ``has_news``.
        """
        call = f"{type(self).__name__}.step"
        is_current = self._tracked.is_current
        groups = self._tracked.groups
        if not is_current:
            everything = [*sharded_parameters(self.model).values(), *self.parameters()]
            groups = groups_of(everything, with_replicas=True)
        with mistakes_shared(call, groups):
            if check is not None:
                check()
            if not is_current:
                self._tracked.refresh()
                self._tracked.warn_of_late_parameters()
        own = {"trained parameters": sum(p.requires_grad for p in self.parameters())}
        # Where the model was plain when this was made, no rank has heard of the others' arguments.
        now = {"trained": self._tracked.trained_names, "prunable parameters": self.prunable.names}
        return meet(call, own | self.made_with | now | facts, groups, has_news=has_news)

    def _grad_norm(self, loss: Any = None) -> float:
        """The norm over all parameters of the base, each once: see ``global_grad_norm``.

        NaN if ``loss``, which a closure has returned, is a number and not finite.
        """
        return norm_among(
            unique_tensors(self.parameters()), self._tracked.spread, scalar_loss(loss)
        )

    def _count_skipped(self, loss: Any, when: str = "") -> None:
        """Note that the step is skipped, ``when`` in it, and why. Gradients are still there."""
        own = {id(p): p for p in self.parameters()}
        in_model = sharded_parameters(self.model).items()
        named: dict[str, Tensor] = {n: own.pop(id(p)) for n, p in in_model if id(p) in own}
        named |= {f"parameter {i} outside of the model": p for i, p in enumerate(own.values())}
        self.skipped_steps += 1
        self.last_bad = name_not_finite(named, loss, self._tracked.groups) + when

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dictionary, with what the wrapper remembers in its groups."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary of this wrapper, or of a bare base optimizer."""
        self.base.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied or pickled: copies would lack what holds an optimizer to a model."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: copy the model, make another "
            "around it, and give that load_state_dict(copy.deepcopy(optimizer.state_dict()))."
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the base optimizer another group of parameters."""
        super().add_param_group(param_group)
        if self._unused is None:
            self._tracked.record_base_parameters()
            self._remember_defaults()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, a collective when the model is sharded.

        What each wrapper does around the base's step is made of these parts, in this order:

        1. ``meet``: all ranks are about to take the same step.
        2. The closure, if there is one, with gradients enabled, makes gradients; an exception in it
           leaves all as it was (``rollback_on_exception``).
        3. Where the call ``_only_makes_state``: the base's step, and what the wrapper keeps of each
           parameter in ``state``, no more. DCP loads into entries that are there, so that what a
           parameter ever has, it has after any step.
        4. The norm, ``last_grad_norm``. Where it is not finite nothing changes but
           ``_count_skipped``.
        5. ``scale_grads_``, and the base's step.
        6. What the next step must know is remembered, under keys of the parameter groups, and what
           was gathered of edited weights is freed (``reshard_all``).

        ``last_bad`` is None unless the step was skipped; the loss is returned.
        """
        raise NotImplementedError

    def _only_makes_state(self) -> bool:
        """Whether this is DCP's call that makes an optimizer fill its state.

        Learning rates and gradients are all zero then, and there is no state, on all ranks. A
        collective when sharded.
        """
        if self.state or not self._has_no_rate() or self._grad_norm():
            return False
        return self._on_any_rank(self._has_grads())

    def _on_any_rank(self, is_here: bool) -> bool:
        """Whether something is so on any rank. A collective when sharded."""
        return meet(f"{type(self).__name__}.step", {}, self._tracked.groups, has_news=is_here)

    def _grads(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters() if parameter.grad is not None]

    def _has_grads(self) -> bool:
        return bool(self._grads())

    def _has_no_rate(self) -> bool:
        return not any(float(group.get("lr", 1)) for group in self.param_groups)

    def _recall(self, key: str) -> Any:
        return self.param_groups[0].get(key, self._remembered[key])

    def _remember(self, key: str, value: int | float | str) -> None:
        self._remembered[key] = value  # groups may be replaced by others
        for group in self.param_groups:
            group[key] = value

    def _on_load(self, base: torch.optim.Optimizer) -> None:
        self._remember_defaults()

    def _remember_defaults(self) -> None:
        for group in self.param_groups:
            for key, value in self._remembered.items():
                group.setdefault(key, value)
