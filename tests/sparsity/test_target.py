"""How a target of compression is written."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from qsdp import Compression


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.7", {"sparsity": 0.7}),
        (0.7, {"sparsity": 0.7}),
        (0, {}),
        ("0", {}),
        ("2:4", {"pattern": (2, 4)}),
        ("63:64", {"pattern": (63, 64)}),
        ("4bit", {"bits": 4}),
        ("8bits", {"bits": 8}),
        ("0.7+layer", {"sparsity": 0.7, "scope": "layer"}),
        ("layer + 0.7", {"sparsity": 0.7, "scope": "layer"}),
        ("0.7+global", {"sparsity": 0.7}),
        ("0.5+block4+8bit", {"sparsity": 0.5, "block": 4, "bits": 8}),
        ("2:4+4bit", {"pattern": (2, 4), "bits": 4}),
        (Compression(bits=3), {"bits": 3}),
    ],
    ids=str,
)
def test_a_target_is_read_from_its_terms(text: Any, expected: dict[str, Any]) -> None:
    assert Compression.of(text) == Compression(**expected)


def test_what_a_target_says_of_itself_is_read_back_as_the_same() -> None:
    choices = {
        "sparsity": [0.0, 0.7, 1e-9, 1 / 3, 0.123456789, 0.9999999],
        "scope": ["global", "layer"],
        "block": [1, 4],
        "bits": [None, 2, 8],
    }
    for values in itertools.product(*choices.values()):
        given = dict(zip(choices, values, strict=True))
        if not given["sparsity"]:
            given |= {"scope": "global", "block": 1}  # of what is pruned
        target = Compression(**given)
        assert Compression.of(str(target)) == target
    for bits in choices["bits"]:
        target = Compression(pattern=(4, 8), bits=bits)
        assert Compression.of(str(target)) == target
    assert str(Compression.of("8bit + block4 + 0.5 + layer")) == "0.5+layer+block4+8bit"


@pytest.mark.parametrize(
    ("target", "fraction", "size"),
    [("0.7", 0.7, 1), ("2:4", 0.5, 4), ("1:8+4bit", 0.875, 8), ("0.5+block4", 0.5, 4), (0, 0, 1)],
)
def test_what_is_pruned_and_in_which_groups(target: Any, fraction: float, size: int) -> None:
    assert Compression.of(target).fraction == fraction
    assert Compression.of(target).group_size == size


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("1.0", "sparsity is 1.0: choose"),
        (-0.1, "sparsity is -0.1: choose"),
        ("nan", "sparsity is nan: choose"),
        ("4:4", "pattern is 4:4: choose"),
        ("0:4", "pattern is 0:4: choose"),
        ("5:4", "pattern is 5:4: choose"),
        ("2:65", "pattern is 2:65: choose"),
        ("0.5+2:4", "give one or the other"),
        ("2:4+layer", "give one or the other"),
        ("2:4+block4", "give one or the other"),
        ("block0", "block is 0: choose"),
        ("block65", "block is 65: choose"),
        ("1bit", "bits is 1: choose"),
        ("9bit", "bits is 9: choose"),
        ("0.5+0.6", "says sparsity twice"),
        ("4bit+8bit", "says bits twice"),
        ("layer+global", "says scope twice"),
        ("", "has the term '': give"),
        ("0.5+", "has the term '': give"),
        ("2:4:8", "has the term '2:4:8': give"),
        ("rows", "has the term 'rows': give"),
        ("layer", "scope is 'layer', but sparsity is 0"),
        ("4bit+layer", "scope is 'layer', but sparsity is 0"),
        ("0+block4", "block is 4, but sparsity is 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_sentence(target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Compression.of(target)
    assert "\n" not in str(caught.value)


def test_blocks_bits_and_patterns_are_whole_numbers() -> None:
    for given in ({"bits": 2.5}, {"block": 1.5}, {"bits": True}):
        with pytest.raises(ValueError, match="choose a whole number"):
            Compression(sparsity=0.5, **given)  # type: ignore[arg-type]
    for pattern in ((2.0, 4), (2,), (2, 4, 8), "2:4", 2):
        with pytest.raises(ValueError, match="choose two whole numbers"):
            Compression(pattern=pattern)  # type: ignore[arg-type]
