"""Whether what the settings say of parameters, by name or as embeddings, fits a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from qsdp.config import QSDPConfig


def check_policy(config: QSDPConfig, names: Sequence[str], aliases: Mapping[str, str]) -> None:
    """Raise ValueError unless every pattern of the policy sets the bits of one of ``names``.

    Those are a model's; ``aliases`` are further names of tied parameters, each with the one among
    ``names``.
    """
    left = set(names)
    for pattern, _ in config.policy:
        named = {name for name in names if fnmatchcase(name, pattern)}
        if not named:
            for alias, name in aliases.items():
                if fnmatchcase(alias, pattern):
                    raise ValueError(
                        f"the policy pattern {pattern!r} matches only {alias!r}, which is tied "
                        f"to {name!r}: use that name."
                    )
            raise ValueError(
                f"the policy pattern {pattern!r} matches no parameter: give a pattern of names "
                f"such as {names[0]!r}, with * for any characters."
            )
        if left.isdisjoint(named):
            raise ValueError(
                f"the policy pattern {pattern!r} matches only parameters that patterns before "
                "it match: put it before them, or leave it out."
            )
        left -= named


def check_embeddings(config: QSDPConfig, names: Collection[str]) -> None:
    """Raise ValueError where ``embedding_bits``, beside the policy, give none of ``names`` bits."""
    if config.embedding_bits is None or any(config.bits_by_policy(n) is None for n in names):
        return
    why = "which the policy gives bits already" if names else "of which the model has none"
    raise ValueError(
        f"embedding_bits is {config.embedding_bits}, for embeddings and the head, {why}: leave "
        "it out."
    )
