"""Optimizers that a function of the user makes, in libraries that prepare model and base first."""

from __future__ import annotations

from typing import Any

from qsdp.methods.cram.two_passes import TwoPassOptimizer
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


def check_whole_batch(optimizer: object, accelerator: Any) -> None:
    """Raise ValueError for two passes where ``accelerator`` cuts the sequences of a batch."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    is_cut = any(getattr(parallelism, f"{way}_enabled", False) for way in ("cp", "sp"))
    if is_cut and isinstance(optimizer, TwoPassOptimizer):
        raise ValueError(
            f"{type(optimizer).__name__} is given beside context or sequence parallelism, whose "
            "parts of a batch its second pass would not see: leave out one of the two."
        )


def check_clipped_once(optimizer: object, other: str, advice: str) -> None:
    """Raise ValueError where ``optimizer`` has a ``max_norm`` of its own beside ``other``."""
    if getattr(optimizer, "max_norm", None) is not None:
        name = type(optimizer).__name__
        raise ValueError(f"{name} clips at its max_norm, and {other}: {advice}.")
