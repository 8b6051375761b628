"""Which entries of an optimizer's state are first moments, and how they are set to zero."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qsdp.common.rank_agreement import warn
from qsdp.common.user_errors import names_for_user

_FIRST = {
    # Adam's kin, Lion, Adan, AdEMAMix; SGD, RMSprop, Muon; Dion, LARS.
    *("exp_avg", "exp_avg_diff", "exp_avg_fast", "exp_avg_slow", "momentum_buffer", "momentum"),
    # bitsandbytes: values, or codes with what they are scaled by.
    *("state1", "absmax1", "max1", "new_max1"),
}
# What else there may be of a weight's size.
_OTHERS = {
    *("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta", "sum"),
    *("variance", "prev", "step_size", "ax", "state2", "neg_pre_grad", "previous_grad"),
}
_WITHOUT_MOMENTUM = ("adagrad", "rmsprop")  # of bitsandbytes, whose only state is a second moment
_ENOUGH = 128  # squared, weights that classes of 8 bits do not leave in fp32


class FirstMoments:
    """The first moments in an optimizer's state, by the names that optimizers give them."""

    def __init__(self, base: torch.optim.Optimizer, owner: str) -> None:
        """Check that ``owner`` can set them to zero.

        Raises ValueError if it cannot, as far as a step of another optimizer of this kind shows.
        """
        self._base, self._owner = base, owner
        kind = getattr(base, "optimizer_name", None)
        self._names = _FIRST - ({"state1"} if kind in _WITHOUT_MOMENTUM else set())
        self._is_told = False
        self._settable: set[type] = {Tensor, nn.Parameter}
        if not type(base).__module__.startswith("torch.optim."):
            for state in _tried(base):
                self._check(state, is_spare=True)

    def zero_(self) -> None:
        """Set all of them to zero, this rank's part."""
        with torch.no_grad():
            for state in self._base.state.values():
                for _, values in self._of(state):
                    _zero_(values)

    def check(self) -> None:
        """Raise ValueError if some cannot be set to zero. Changes nothing.

        It warns, once, of state that may be a first moment under another name.
        """
        for state in self._base.state.values():
            self._check(state, is_spare=False)
        if not self._is_told and self._base.state:
            self._is_told = True
            self._warn_of_unknown()

    def _of(self, state: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
        for name, value in state.items():
            if name in self._names and isinstance(value, Tensor):
                yield name, value.to_local() if isinstance(value, DTensor) else value

    def _check(self, state: Mapping[str, Any], *, is_spare: bool) -> None:
        """Check one ``state``, which may be changed if it ``is_spare``."""
        for name, values in self._of(state):
            kind = type(values)
            if kind in self._settable:
                continue
            try:
                with torch.no_grad():
                    _zero_(values if is_spare else values.clone())
            except Exception as error:  # of a class that may do anything
                raise ValueError(
                    f"{self._owner} sets the first moments of its base to zero when masks are "
                    f"lifted, and {type(self._base).__name__} keeps {name} as {kind.__name__}, "
                    f"which cannot be set to zero ({type(error).__name__} in zero_ and copy_): "
                    "give a base with another state, such as torch.optim.AdamW."
                ) from None
            self._settable.add(kind)

    def _warn_of_unknown(self) -> None:
        known = self._names | _OTHERS
        unknown = dict.fromkeys(
            name
            for key, state in self._base.state.items()
            for name, value in state.items()
            if name not in known and _may_be_moment(value, key)
        )
        if unknown:
            warn(
                f"{self._owner} does not know {names_for_user([*unknown])} of the state of "
                f"{type(self._base).__name__}, and leaves it as it is when masks are lifted: if it "
                "is momentum, set it to zero after the step from which on schedule.is_compressed("
                "num_steps) is false."
            )


def _may_be_moment(value: object, parameter: object) -> bool:
    """Whether ``value`` has a number for each weight, or might hold what has."""
    if isinstance(value, Tensor) and isinstance(parameter, Tensor):
        return value.shape == parameter.shape and value.dim() > 0 and value.dtype != torch.bool
    return not isinstance(value, Tensor | str | int | float | None)


def _zero_(values: Tensor) -> None:
    """Set ``values``, of any class, to zero, through what the class offers.

    Loading a state needs ``copy_`` anyway.
    """
    try:
        values.zero_()
    except Exception:  # what is not implemented is told in many ways
        values.copy_(torch.zeros(values.shape, dtype=values.dtype, device=values.device))


def _tried(base: torch.optim.Optimizer) -> list[Mapping[str, Any]]:
    """The states of an optimizer of one parameter, made as ``base`` is, after a step.

    None if that cannot be made, or stepped.
    """
    first = next(each for group in base.param_groups for each in group["params"])
    device = first.device if first.device.type != "meta" else torch.device("cpu")
    parameter = nn.Parameter(torch.zeros(_ENOUGH, _ENOUGH, dtype=first.dtype, device=device))
    parameter.grad = torch.zeros_like(parameter)
    taken = inspect.signature(type(base)).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    options = {n: v for n, v in base.defaults.items() if takes_all or n in taken}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            another = type(base)([parameter], **options)
            another.step()
    except Exception:  # of code that nobody here knows
        return []
    return [*another.state.values()]
