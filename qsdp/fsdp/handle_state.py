"""The form of a handle's state: checked before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from reprlib import repr as shown
from typing import Any

from qsdp.codec.change_frame import MOST_STEPS
from qsdp.config import QSDPConfig


def _is_whole_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_is_whole_number, "a whole number from 0 to 2**63 - 1"),
    "step": (_is_whole_number, "a whole number from 0 to 2**63 - 1"),
    "reduced": (lambda value: type(value) in (int, bool) and value in (0, 1), "0 or 1"),
    "request": (lambda value: type(value) is dict, "a dict"),
    "bits": (lambda value: type(value) in (dict, list), "a dict by name"),
    "levels": (lambda value: type(value) is list, "a list of rows"),
    "parameters": (lambda value: type(value) is dict, "a dict of shapes by name"),
    "grids": (lambda value: type(value) is str, "a text"),
}
"""What each key may hold, and that in words.
Earlier versions wrote no parameters, no grids, and a list of bits.
"""
_NEWER = ("parameters", "grids")


def check_form(state: object, config: QSDPConfig) -> None:
    """Raise ValueError unless a handle's ``state`` has the keys of ``state_dict``, of its types.

    So for a step that a handle of ``config`` cannot be at. What is in bits and levels,
    ``Adaptation.check_state`` looks at.
    """
    if not isinstance(state, dict):
        raise ValueError(
            f"the state is a {type(state).__name__}: give the dict that handle.state_dict() "
            "returns."
        )
    missing = [key for key in _KEYS if key not in state and key not in _NEWER]
    if missing:
        raise ValueError(
            f"the state lacks {', '.join(missing)}: give all that handle.state_dict() returns."
        )
    for key, (is_right, words) in _KEYS.items():
        if key in state and not is_right(state[key]):
            raise ValueError(
                f"the state's {key} is {shown(state[key])}: give {words}, as state_dict() returned "
                "it."
            )
    if config.gather == "delta" and state["step"] >= MOST_STEPS:
        raise ValueError(
            f"the state's step is {state['step']}, but with gather='delta' a step is less than "
            f"{MOST_STEPS}: choose gather 'once' or 'twice'."
        )
