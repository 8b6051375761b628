"""Decorators of constructors: arguments must be known, and the same on all ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import wraps
from typing import ParamSpec

from torch import Tensor, nn

from qsdp.common.meshes import groups_of
from qsdp.common.rank_agreement import meet, mistakes_shared
from qsdp.compat.resharding import reshard

P = ParamSpec("P")


def _described(value: object) -> str:
    """``value`` in words that do not depend on the process or its GPU."""
    if isinstance(value, Mapping):
        pairs = (f"{name!r}: {_described(each)}" for name, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, Tensor):
        return str(value.tolist())
    is_plain = value is None or isinstance(value, str | int | float) or is_dataclass(value)
    return repr(value) if is_plain else type(value).__name__


def reject_unknown_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor to say which arguments it takes when it is given another by name."""
    _, *known = inspect.signature(init).parameters

    @wraps(init)
    def made(*args: P.args, **options: P.kwargs) -> None:
        for name in options:
            if name not in known:
                own = f"qsdp.{type(args[0]).__name__}"
                raise TypeError(f"{own} has no argument {name!r}: choose among {', '.join(known)}.")
        init(*args, **options)

    return made


def collective_constructor(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor ``(self, model, base_optimizer, ...)``: all ranks construct alike.

    All ranks that share the model raise RuntimeError if their arguments differ.
    """
    signature = inspect.signature(init)

    @wraps(init)
    def made(*args: P.args, **options: P.kwargs) -> None:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        self, model, _ = (bound.arguments.pop(name) for name in ("self", "model", "base_optimizer"))
        facts: dict[str, object] = {
            name: _described(value) for name, value in bound.arguments.items()
        }
        groups = []
        if isinstance(model, nn.Module):
            reshard(model)
            groups = groups_of(model.parameters())
        call = f"qsdp.{type(self).__name__}"
        with mistakes_shared(call, groups):
            init(*args, **options)
            facts["prunable parameters"] = self.prunable.names
            facts["base_optimizer"] = f"{type(self.base).__name__} {_described(self.base.defaults)}"
            facts["parameters of the optimizer"] = len(self.parameters())
        meet(call, facts, groups)
        self.made_with = facts
        self.attach()

    return reject_unknown_arguments(made)
