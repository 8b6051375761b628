"""Docstrings and comments speak one dialect."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("qsdp", "launch", "benchmarks", "tests", "tests_distributed")
_SINGLE = re.compile(r"(?<!`)`(?!`)[^`]*`(?!`)")
_SECTION = re.compile(r"(Args|Returns|Raises|Yields):")
_OTHER_SECTION = re.compile(r"(Args|Returns?|Raises|Yields?)\b:.*|[A-Z]\w+( [A-Z]\w+)?:")
_PROSE = re.compile(r"(Returns|Raises|Yields) ")
_ENTRY = re.compile(r"(\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*): (.*)")
_BEGINS_WELL = re.compile(r"[A-Z0-9\[`\"(+-]|((u?int|fp|bf|float|complex)\d+|bool)\b")


def mistakes(source: str) -> Iterator[tuple[int, str]]:
    """The lines of ``source`` whose docstring or comment is in another dialect, and why."""
    if re.search("#.*`", source):  # reading tokens takes long
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and _SINGLE.search(token.string):
                yield token.start[0], "a name in single backquotes"
    tree, lines = ast.parse(source), source.split("\n")
    nodes = [*ast.walk(tree)]
    for node in filter(is_docstring, nodes):
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for line, why in mistakes_in(text.strip(), node.col_offset):
            yield node.lineno + line, why
    # The description of a command, and the fields of its flags.
    shown = tree.body[:1] if re.search(r"\b__doc__\b", source) else []
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Flags", "Options")):
            shown += filter(is_docstring, node.body[1:])
    for node in shown:
        if "`" in ast.unparse(node):
            yield node.lineno, "backquotes, which --help shows"


def is_docstring(node: ast.AST) -> bool:
    """Whether ``node`` is one of a module, class, function or field: a text as a statement."""
    is_value = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_value and isinstance(node.value.value, str)


def mistakes_in(docstring: str, indent: int) -> Iterator[tuple[int, str]]:
    """The same of a docstring with its quotes; lines count from 0."""
    for match in _SINGLE.finditer(docstring):
        yield docstring.count("\n", 0, match.start()), "a name in single backquotes"
    lines = docstring.strip('r"').rstrip().split("\n")
    if not lines[0].endswith((".", "?")):
        yield 0, "a first line that is no sentence with a full stop"
    section, has_sections = "", any(_SECTION.fullmatch(line.strip()) for line in lines)
    for number, line in [*enumerate(lines)][1:]:
        depth = len(line) - len(line.lstrip()) - indent
        above, text = lines[number - 1].strip(), line.strip()
        if text and depth <= 0:
            section = text if _SECTION.fullmatch(text) else ""
            if section and above:
                yield number, f"no blank line before {section}"
            if not section and _OTHER_SECTION.fullmatch(text):
                yield number, "a section of another name, or with text on its line"
            if has_sections and not above and _PROSE.match(text):
                yield number, f"{text.split()[0]} beside sections and not in one"
        elif section and text:
            is_named = section in ("Args:", "Raises:")
            if depth == 4 and (is_named or above == section):
                entry = _ENTRY.fullmatch(text) if is_named else None
                if is_named and not entry:
                    yield number, "an entry without a name"
                begin = entry[2] if entry else text
                if not _BEGINS_WELL.match(begin) or (section == "Raises:" and begin[:3] == "If "):
                    yield number, "an entry that does not begin with a sentence"
            below = lines[number + 1] if number + 1 < len(lines) else ""
            is_last = not below.strip() or (is_named and below[indent + 4] != " ")
            if is_last and not text.endswith((".", "?")):
                yield number, "an entry that does not end with a full stop"


def test_docstrings_and_comments_are_in_the_one_dialect() -> None:
    texts = {file: file.read_text() for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    assert len(texts) > 100
    found = [(file, *each) for file, text in texts.items() for each in mistakes(text)]
    assert [f"{file.relative_to(ROOT)}:{line}: {why}" for file, line, why in found] == []


GOOD = '"""Do it.\n\nArgs:\n    x, y: Of ``z``,\n        or not.\n\nRaises:\n    OSError: No."""'


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("``z``", "`z`", 4),
        ('"""Do', '# `x`\n"""Do', 1),
        ("Do it.", "Do it", 1),
        ("Do it.", "\nDo it.", 1),
        ("it.\n", "it.", 2),
        ("Args:", "Parameters:", 3),
        ("Raises:\n   ", "Raises:", 7),
        ("Raises:\n    OSError: No.", "Raises OSError: No.", 7),
        ("Of ``z``", "of ``z``", 4),
        ("x, y: Of", "Of", 4),
        ("or not.", "or not", 5),
        ("OSError: No", "OSError: If not", 8),
        ('No."""', 'No."""\n__doc__', 1),
        ("Do it.", 'A."""\nclass Flags:\n    x: int\n    y: int\n    """``Z``.', 5),
    ],
)
def test_a_mistake_of_each_kind_is_seen_at_its_line(old: str, new: str, line: int) -> None:
    assert [*mistakes(GOOD)] == []
    assert line in dict(mistakes(GOOD.replace(old, new, 1)))
