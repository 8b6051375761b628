"""How tests run on ranks: the type of their fixture, and which variants are heavy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

Run = Callable[..., list[Any]]


def selection(
    names: str | Sequence[str], chosen: Sequence[tuple[Any, ...]], *factors: Sequence[Any]
) -> pytest.MarkDecorator:
    """Parametrize by the whole product of ``factors``, of which all but ``chosen`` are heavy."""
    product = list(itertools.product(*factors))
    assert set(chosen) <= set(product), "a chosen one is not of the product"
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*each, marks=() if each in chosen else pytest.mark.heavy)
            for each in product
        ],
    )
