"""Optimizers that a function of the user makes, in libraries that prepare model and base first."""

from __future__ import annotations

from typing import Any

from qsdp.methods.optimizer_wrapper import OptimizerWrapper


def check_method(method: object) -> None:
    """Raise ValueError for a ``method`` that is no function, before anything is prepared."""
    if method is not None and not callable(method):
        raise ValueError(f"method is a {type(method).__name__}: give a function that makes it.")


def made_by(method: Any, *args: Any) -> OptimizerWrapper:
    """What ``method`` makes of ``args``; a ValueError where that is no optimizer of qsdp."""
    made = method(*args)
    if not isinstance(made, OptimizerWrapper):
        name = None if made is None else type(made).__name__
        raise ValueError(f"method has made {name}: return CrAM, ACDC, GMP or SAM.")
    return made


def check_clipped_once(optimizer: object, other: str, advice: str) -> None:
    """Raise ValueError where ``optimizer`` has a ``max_norm`` of its own beside ``other``."""
    if getattr(optimizer, "max_norm", None) is not None:
        name = type(optimizer).__name__
        raise ValueError(f"{name} clips at its max_norm, and {other}: {advice}.")
