"""Hooks that call a method of an object and do not keep it alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast


def register_weak_hook(register: Callable[..., Any], method: Callable[..., Any]) -> None:
    """Register a weak hook: one that calls ``method``, and does not hold its object.

    It goes with that object: a base may be wrapped again and again.
    """
    held = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        bound = held()
        return None if bound is None else bound(*args)

    end = weakref.finalize(cast(Any, method).__self__, register(call).remove)
    end.atexit = False
