"""benchmarks/ as a house: its index is complete, and support stands on nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ROOT / "benchmarks"
FILES = [path for path in ROOMS.rglob("*.py") if path.name != "__init__.py"]
RUN_BY_OTHERS = {"changes_rank", "crash_rank", "losses", "passes", "turns"}
"""Programs that are nothing without the one that starts them."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_program_is_in_the_index_with_its_command() -> None:
    index = (ROOMS / "README.md").read_text()
    programs = [path for path in FILES if '__name__ == "__main__"' in path.read_text()]
    assert len(programs) > 15
    for path in programs:
        if path.stem not in RUN_BY_OTHERS:
            assert re.search(rf"`[^`]*-m {module_of(path)}\b[^`]*`", index), module_of(path)


def test_commands_that_are_named_exist() -> None:
    modules = {module_of(path) for path in FILES}
    texts = [*FILES, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / ".ci" / "gpu"]
    texts.append(ROOMS / "README.md")
    named = {
        (text.name, module)
        for text in texts
        for module in re.findall(r"\bbenchmarks\.[a-z_]+\.[a-z_]+", text.read_text())
    }
    assert len(named) > 30
    assert {(name, module) for name, module in named if module not in modules} == set()


def test_support_imports_from_no_other_room() -> None:
    for path in ROOMS.glob("support/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
                assert (node.module or "").startswith("benchmarks.support"), path.name
