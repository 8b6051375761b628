"""A topology is known where it is defined: whatever sends, counts or reports goes by its stages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "qsdp"

# Names of what only some topologies have, and of one topology.
NAMES = {"LOCAL", "ACROSS", "is_two_hop"}
TEXTS = {"two-hop", "two hops"}
MAY_SAY = {
    "config.py": {"two-hop"},  # a user's word
    "common/wire_company.py": {"two-hop"},  # in advice
    "codec/random_numbers.py": {"LOCAL", "ACROSS"},  # where they are numbered
    "comm/topology.py": {"LOCAL", "ACROSS", "two-hop", "two hops"},
    "simulation/stages.py": {"LOCAL", "ACROSS", "two-hop"},
    "simulation/simulated_wire.py": {"LOCAL"},  # more bits inside nodes, written apart
    # What is measured beforehand, and by which formulas it is predicted, is of one topology.
    "train/auto/cost_model.py": {"two hops", "is_two_hop"},
}


def said(tree: ast.Module) -> Iterator[str]:
    """Of NAMES and TEXTS those that a file has, but for docstrings."""
    documents = {
        id(statement.value) for statement in ast.walk(tree) if isinstance(statement, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            yield from NAMES & {name}
        elif isinstance(node, ast.Constant) and id(node) not in documents:
            yield from (text for text in TEXTS if text in str(node.value))


def test_one_topology_is_named_by_few_files() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = {name: {*said(ast.parse(path.read_text()))} for name, path in files.items()}
    assert {name: words for name, words in found.items() if words} == MAY_SAY


def test_a_case_of_one_topology_is_seen() -> None:
    for code in ("if plan.is_two_hop: pass", "x = Stage.ACROSS", "y = reduce == 'two-hop'"):
        assert [*said(ast.parse(code))], code
    assert [*said(ast.parse('def f():\n    """In two hops."""'))] == []
