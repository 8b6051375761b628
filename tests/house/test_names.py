"""A name leads to its file: what has the name of a file stands in it, and has a first line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

QSDP = Path(__file__).parents[2] / "qsdp"
# Public names whose first lines say where they stand; ``prepare`` is Accelerate's.
ELSEWHERE = {"compress_", "prepare"}

Found = tuple[str, ast.FunctionDef | ast.ClassDef]


def snake(name: str) -> str:
    """``AllGathers`` as ``all_gather``."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    return parted.removesuffix("s")


def public_ones(source: str) -> Iterator[Found]:
    """The public functions and classes of a file, by their names."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node


SOURCES = {path: path.read_text() for path in sorted(QSDP.rglob("*.py"))}


def misleading(sources: dict[Path, str]) -> list[str]:
    """The public functions and classes that have the name of files which they do not stand in."""
    stems: dict[str, set[Path]] = {}
    for path in sources:
        if path.stem not in ("__init__", "__main__"):
            stems.setdefault(snake(path.stem), set()).add(path)
    return [
        f"{name} in {path}"
        for path, source in sources.items()
        for name, _ in public_ones(source)
        if name not in ELSEWHERE and path not in stems.get(snake(name), {path})
    ]


def test_what_has_the_name_of_a_file_stands_in_it() -> None:
    assert sum(1 for source in SOURCES.values() for _ in public_ones(source)) > 500
    assert misleading(SOURCES) == []


def test_a_class_with_the_name_of_another_file_is_seen() -> None:
    here, there = Path("a/late_reduces.py"), Path("b/hooks.py")
    sources = {here: "", there: "class LateReduce: ...\ndef hook(): ..."}
    assert misleading(sources) == [f"LateReduce in {there}"]


def test_every_public_function_and_class_has_a_docstring() -> None:
    without = [
        f"{path}: {name}"
        for path, source in SOURCES.items()
        for name, node in public_ones(source)
        if not ast.get_docstring(node)
    ]
    assert without == []
