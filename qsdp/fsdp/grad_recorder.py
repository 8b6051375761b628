"""Which parameters of a group got a gradient, where FSDP2 does not say."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from qsdp.comm.group_plan import Plan
from qsdp.compat.parameter_group import ParameterGroup


class GradRecorder:
    """Records which parameters of a group got a gradient since its last reduce.

    FSDP2's reduce buffer holds only those, without names, and a size can be ambiguous. So each
    parameter says so itself, by a hook on the tensor that autograd accumulates into. That tensor is
    made by the group's first gather, and stays: it is looked for at the forward of the group's
    modules, and until it is there at every later gather of any group, for modules that are entered
    through a method of their own. Frozen parameters are watched too: they may be trained later.

    [Note: Hooks] torch keeps a tensor's hooks in C++, where Python's collector does not look: one
    that leads back to its tensor, over whatever it holds, keeps all of that for ever. So a hook on
    a tensor holds only what it writes to, and one on a module holds its owner weakly.
    """

    def __init__(self, plan: Plan, group: ParameterGroup) -> None:
        self._plan, self._group = plan, group
        self._padded = [p.padded_numel(plan.world_size) for p in plan.parameters]
        self._got_grad: set[int] = set()
        self._watched: set[int] = set()
        # A block's compiler shall not look inside: what the hook finds changes from step to step.
        hook = torch.compiler.disable(partial(_watch_if_alive, weakref.ref(self)))
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(hook) for module in group.modules
        ]

    def take(self, numel: int) -> tuple[int, ...]:
        """Places of the parameters in a reduce buffer of ``numel`` values a rank.

        Raises RuntimeError when what was recorded does not fill the buffer.
        """
        # Asked anew: parameters may be frozen, or trained, at any time after install.
        tensors = self._group.unsharded_parameters()
        trainable = tuple(i for i, t in enumerate(tensors) if t is not None and t.requires_grad)
        found = trainable if self._group.reduces_unused else tuple(sorted(self._got_grad))
        if numel != self._numel(found) and numel == self._numel(trainable):
            # Nothing was watched yet. A full buffer is unambiguous all the same, since every strict
            # subset is smaller.
            found = trainable
        if numel != self._numel(found):
            names = [self._plan.parameters[i].name for i in found]
            raise RuntimeError(
                f"FSDP2 reduces {numel} values a rank for the group of {self._plan.name}, but "
                f"{self._numel(found)} belong to the parameters seen to get a gradient "
                f"({', '.join(names) or 'none'}): call its module through forward(), and let "
                "autograd bring its gradients, since qsdp does not see those that are set by hand."
            )
        self._got_grad.clear()
        return found

    def watch(self) -> bool:
        """Hook on to the tensors that have come into being. Returns whether all have by now."""
        num_parameters = len(self._plan.parameters)
        if len(self._watched) < num_parameters:
            for i, tensor in enumerate(self._group.unsharded_parameters()):
                if tensor is not None and i not in self._watched:
                    self._watched.add(i)
                    self._hook_on(tensor, partial(_record_grad, self._got_grad, i))
        return len(self._watched) == num_parameters

    def forget_what_was_dropped(self) -> None:
        """Keep only records of gradients that still wait: a backward may have been cut short."""
        self._got_grad &= self._group.pending_gradients()

    def remove(self) -> None:
        """Record nothing any more."""
        for handle in self._handles:
            handle.remove()

    def _hook_on(self, tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
        if not tensor.is_floating_point() or tensor.is_inference():  # no gradient will ever come
            return
        is_trained = tensor.requires_grad
        tensor.requires_grad_(True)  # torch hooks on to no other
        self._handles.append(tensor.register_post_accumulate_grad_hook(hook))
        tensor.requires_grad_(is_trained)

    def _numel(self, places: Sequence[int]) -> int:
        return sum(self._padded[i] for i in places)


def _watch_if_alive(recorder: weakref.ref[GradRecorder], *_: object) -> None:
    if (found := recorder()) is not None:
        found.watch()


def _record_grad(got_grad: set[int], place: int, _: Tensor) -> None:
    got_grad.add(place)
