"""What a model is compressed to, said in a few characters. No torch here: command lines use it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

SCOPES = ("global", "layer")


@dataclass(frozen=True, kw_only=True)
class Compression:
    """A target of compression: how many weights are pruned, in which shapes, at how many bits.

    Raises ValueError for what cannot be.
    """

    sparsity: float = 0.0
    """Fraction of the prunable weights set to zero, from 0 to below 1: the smallest magnitudes."""
    scope: str = "global"
    """``global``: all prunable weights compete. ``layer``: each matrix loses the same fraction."""
    pattern: tuple[int, int] | None = None
    """(N, M): of every M weights along the input dimension the N largest stay."""
    block: int = 1
    """Weights along the input dimension that stay or go together, by the sum of magnitudes."""
    bits: int | None = None
    """Bits of the weights that stay, 2 to 8: the nearest of 2**bits - 1 symmetric levels.
    128 weights of a row share a scale.
    """

    def __post_init__(self) -> None:
        for name in ("block", "bits"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ValueError(f"{name} is {value!r}: choose a whole number.")
        if not (math.isfinite(self.sparsity) and 0 <= self.sparsity < 1):
            raise ValueError(f"sparsity is {self.sparsity}: choose a fraction from 0 to below 1.")
        if self.scope not in SCOPES:
            raise ValueError(f"scope is {self.scope!r}: choose one of {', '.join(SCOPES)}.")
        if self.pattern is not None:
            if not isinstance(self.pattern, tuple) or [*map(type, self.pattern)] != [int, int]:
                raise ValueError(f"pattern is {self.pattern!r}: choose two whole numbers (N, M).")
            keep, size = self.pattern
            if not 1 <= keep < size <= 64:
                raise ValueError(f"pattern is {keep}:{size}: choose N:M with 1 <= N < M <= 64.")
            if self.sparsity or self.block != 1 or self.scope != "global":
                raise ValueError(
                    f"pattern {keep}:{size} is given beside a sparsity, scope or block: "
                    "give one or the other."
                )
        if not 1 <= self.block <= 64:
            raise ValueError(f"block is {self.block}: choose 1 to 64 weights.")
        for name, default in (("scope", "global"), ("block", 1)):
            if getattr(self, name) != default and not self.fraction:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but sparsity is 0 and nothing is pruned: "
                    "choose a sparsity above 0, or leave it out."
                )
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}: choose 2 to 8.")

    @classmethod
    def of(cls, target: float | str | Compression) -> Compression:
        """Read a target: a fraction, or terms joined by ``+``.

        Terms are a fraction (``0.7``), N:M (``2:4``), bits (``4bit``), ``layer``, or a block
        (``block4``): ``0.7+layer``, ``0.5+block4+8bit``, ``2:4+4bit``. Raises ValueError for what
        cannot be.
        """
        if isinstance(target, Compression):
            return target
        if not isinstance(target, str):
            return cls(sparsity=float(target))
        values: dict[str, object] = {}
        for term in target.replace(" ", "").split("+"):
            name, value = _read(term, target)
            if name in values:
                raise ValueError(f"the target {target!r} says {name} twice: say it once.")
            values[name] = value
        return cls(**values)  # type: ignore[arg-type]

    @property
    def group_size(self) -> int:
        """Weights along the input dimension that are looked at together."""
        return self.block if self.pattern is None else self.pattern[1]

    @property
    def fraction(self) -> float:
        """The fraction of weights that is pruned."""
        return self.sparsity if self.pattern is None else 1 - self.pattern[0] / self.pattern[1]

    def __str__(self) -> str:
        terms = []
        if self.pattern is not None:
            terms.append("{}:{}".format(*self.pattern))
        elif self.sparsity or self.bits is None:
            terms.append(str(self.sparsity))
        terms += [self.scope] if self.scope != "global" else []
        terms += [f"block{self.block}"] if self.block != 1 else []
        terms += [f"{self.bits}bit"] if self.bits is not None else []
        return "+".join(terms)


def _read(term: str, target: str) -> tuple[str, object]:
    if match := re.fullmatch(r"(\d+):(\d+)", term):
        return "pattern", (int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+)bits?", term):
        return "bits", int(match[1])
    if match := re.fullmatch(r"block(\d+)", term):
        return "block", int(match[1])
    if term in SCOPES:
        return "scope", term
    try:
        return "sparsity", float(term)
    except ValueError:
        raise ValueError(
            f"the target {target!r} has the term {term!r}: give fractions (0.7), N:M (2:4), bits "
            "(4bit), layer or blocks (block4), joined by +."
        ) from None
