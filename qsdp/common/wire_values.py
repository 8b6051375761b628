"""What single settings of the wire may be, whatever the others are. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIRE_BITS = (*range(2, 9), 16, 32)
MAX_BUCKET_SIZE = 1 << 20
Policy = tuple[tuple[str, int | tuple[int, int]], ...]
"""Pairs (pattern, bits) or (pattern, (weight bits, gradient bits))."""


def check_values(values: Mapping[str, Any], choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError, in one sentence, for a field of a ``QSDPConfig`` that cannot be.

    Args:
        values: All fields by name, the policy among them, for which there is ``checked_policy``.
        choices: What those may be that are words, by name.
    """
    for name in ("weight_bits", "grad_bits"):
        check_config_bits(name, values[name])
    for name in ("embedding_bits", "local_grad_bits", "warmup_bits"):
        if values[name] is not None:
            check_config_bits(name, values[name])
    for name in ("bucket_size", "weight_bucket_size"):
        if values[name] is not None:
            check_bucket_size(name, values[name])
    for name, allowed in choices.items():
        if values[name] not in allowed:
            raise ValueError(f"{name} is {values[name]!r}: choose one of {', '.join(allowed)}.")
    for name in ("ranks_per_node", "delta_redraw_every"):
        if values[name] is not None:
            _check_whole(name, values[name], least=1)
    _check_whole("warmup_steps", values["warmup_steps"], least=0)
    steps = values["level_steps"]
    if steps is not None:
        if not isinstance(steps, list | tuple) or not steps:
            raise ValueError(f"level_steps is {steps!r}: give steps from 1 on.")
        for step in steps:
            _check_whole("level_steps", step, least=1)
    seed, room = values["seed"], values["delta_room"]
    for name in ("budget", "grad_budget"):
        budget = values[name]
        if budget is not None and not (isinstance(budget, int | float) and 2 < budget <= 9):
            raise ValueError(f"{name} is {budget!r}: choose more than 2 and at most 9 bits.")
    if room is not None and not (
        isinstance(room, int | float) and not isinstance(room, bool) and 0 < room <= 1
    ):
        raise ValueError(f"delta_room is {room!r}: choose a number above 0, and at most 1.")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed!r}: choose an integer from 0 to 2**63 - 1.")


def check_config_bits(name: str, bits: object) -> None:
    """Raise ValueError unless ``bits`` is a width that a ``QSDPConfig`` can have."""
    if type(bits) is not int or bits not in WIRE_BITS:
        raise ValueError(f"{name} is {bits!r}: choose 2 to 8, 16 (bf16) or 32 (full precision).")


def _check_whole(name: str, value: object, least: int) -> None:
    if type(value) is not int or not least <= value < 1 << 63:
        raise ValueError(f"{name} holds {value!r}: choose whole numbers from {least} on.")


def check_bucket_size(name: str, size: object, most: int = MAX_BUCKET_SIZE) -> None:
    """Raise ValueError unless buckets of ``size`` values can be packed, and are within ``most``."""
    if type(size) is not int or size % 8 or not 8 <= size <= most:
        raise ValueError(f"{name} is {size!r}: choose a multiple of 8 between 8 and {most}.")


def checked_policy(given: object) -> Policy:
    """The policy that is ``given`` as pairs, in tuples. Raises ValueError for what is none."""
    if not isinstance(given, list | tuple):
        raise ValueError(f"policy is {given!r}: give pairs (name pattern, bits).")
    policy: list[tuple[str, int | tuple[int, int]]] = []
    for pair in given:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) is not str:
            raise ValueError(f"policy holds {pair!r}: give pairs (name pattern, bits).")
        name, bits = pair
        both = tuple(bits) if isinstance(bits, list | tuple) else (bits, bits)
        if len(both) != 2:
            raise ValueError(f"policy for {name!r} is {bits!r}: give bits, or two of them.")
        for each in both:
            check_config_bits(f"policy for {name!r}", each)
        policy.append((name, both if isinstance(bits, list | tuple) else bits))
    return tuple(policy)


def bits_of_both(bits: int | tuple[int, int]) -> tuple[int, int]:
    """Weight and gradient bits of what a policy has: one number for both, or two."""
    return bits if isinstance(bits, tuple) else (bits, bits)
