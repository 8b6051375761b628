"""A rounding is named where it is defined, in the specification and in the kernels.

All others ask for its properties, so that a new one needs no line of theirs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsdp.common.rounding import Drawn, Rounding

ROOT = Path(__file__).parents[2]
MAY_NAME_ONE = {"qsdp/common/rounding.py", "qsdp/ops/reference/codec.py"}
KERNELS_MAY_NAME_ONE = {"common/rounding.h", "cpu/rounding-inl.h", "cuda/rounding.h"}
LABELS = {rounding.label for rounding in Rounding}


def kernel_name(rounding: Rounding) -> str:
    return "k" + rounding.name.title().replace("_", "")


def named(node: ast.AST) -> bool:
    """Whether a rounding is named somewhere in an expression or a pattern."""
    return any(
        (isinstance(each, ast.Constant) and each.value in LABELS)
        or (isinstance(each, ast.Attribute) and each.attr in Rounding.__members__)
        for each in ast.walk(node)
    )


def choices(tree: ast.AST) -> Iterator[int]:
    """Lines that do one thing for a rounding that they name, and another for others.

    These are comparisons, patterns of ``match``, and keys of dicts.
    """
    for node in ast.walk(tree):
        parts: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Dict):
            parts = list(node.keys)
        if any(part is not None and named(part) for part in parts):
            yield node.lineno if hasattr(node, "lineno") else 0


def test_only_the_specification_chooses_by_a_rounding_that_it_names() -> None:
    files = sorted((ROOT / "qsdp").rglob("*.py"))
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        if str(path.relative_to(ROOT)) not in MAY_NAME_ONE
        for line in choices(ast.parse(path.read_text()))
    ]
    assert found == []


def test_only_three_headers_name_one() -> None:
    name = re.compile(rf"\b({'|'.join(kernel_name(rounding) for rounding in Rounding)})\b")
    csrc = ROOT / "csrc"
    naming = {
        str(path.relative_to(csrc))
        for path in csrc.rglob("*")
        if path.suffix in (".h", ".cpp", ".cu") and name.search(path.read_text())
    }
    assert "common/rounding.h" in naming
    assert naming <= KERNELS_MAY_NAME_ONE


@pytest.mark.parametrize(
    "line",
    [
        'if config.rounding == "nearest": pass',
        'own = rounding in ("shift", "dither")',
        "if segment.rounding != Rounding.SHIFT: pass",
        'match how:\n    case "stochastic": pass',
        'cost = {"shift": 1, "dither": 2}[how]',
    ],
)
def test_a_choice_by_name_is_seen(line: str) -> None:
    assert list(choices(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        'return "shift" if bits >= 7 else "dither"',
        "if rounding.properties.is_biased: pass",
        'QSDPConfig(rounding="nearest")',
    ],
)
def test_what_only_names_one_is_no_choice(line: str) -> None:
    assert not list(choices(ast.parse(f"def f():\n    {line}")))


def test_kernels_have_the_same_table() -> None:
    text = (ROOT / "csrc/common/rounding.h").read_text()
    assert {
        match[1]: int(match[2])
        for match in re.finditer(r"^    (k\w+) = (\d+),$", text, re.MULTILINE)
    } == {kernel_name(rounding): rounding for rounding in Rounding}
    table = text[text.index(" properties_of(") :]
    table = table[: table.index("\n}\n")]
    for rounding in Rounding:
        _, _, row = table.partition(f"case {kernel_name(rounding)}:")
        row = (row or table.partition("default:")[2]).partition(";")[0]
        drawn = {
            Drawn.NOTHING: "Drawn::kNothing",
            Drawn.A_BUCKET: "Drawn::kABucket",
            Drawn.A_VALUE: "Drawn::kAValue",
        }[rounding.properties.drawn]
        assert f".drawn = {drawn}" in row, rounding
        for name in ("is_taken_back", "rounds_down", "has_levels", "keeps_grids"):
            assert (f".{name} = true" in row) == getattr(rounding.properties, name), (
                rounding,
                name,
            )


def test_codes_have_no_gaps_and_labels_are_names() -> None:
    assert list(Rounding) == list(range(len(Rounding)))
    for rounding in Rounding:
        assert Rounding.of(rounding.label) is rounding
        assert rounding.properties.drawn in Drawn
    assert [rounding.label for rounding in Rounding][:4] == [
        *("shift", "dither", "stochastic", "nearest"),
    ]
