"""What a module that a registry names holds, under a name that is the same in all of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def held_by_registered(module: str, name: str) -> Any:
    """What a registered ``module`` holds as ``name``, its ``FAMILY`` for instance.

    Raises ValueError where it holds no such thing.
    """
    found = import_module(module)
    if not hasattr(found, name):
        raise ValueError(
            f"{module} is registered, but has no {name}: let it end with {name} = ..., as the "
            "others of its registry do."
        )
    return getattr(found, name)
