"""What users are told is one sentence: what was given, a colon, what to do, a full stop."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TELLING = re.compile(
    r"(\w+\.)*(\w*(Error|Warning|Mistake|Failed|Unavailable|Refused|Stopped|SystemExit)"
    r"|warn|print_error|exit|error)"
)
FIELD, BARE = "\0", "\0.)"
"""What stands for a field of an f-string, and for an error in one, which brings its full stop."""
BEFORE = re.compile(r"(error|warning|error on rank \0|--[\w-]+): ")
CPP = re.compile(r"(?:refuse|_error|stop)\(((?:[^;{\"]|\"(?:[^\"\\]|\\.)*\")*)\);")


def mistakes(text: str) -> list[str]:
    """What is wrong with a message."""
    said = BEFORE.sub("", text, count=1)
    found = {
        "a semicolon": ";" in said,
        "two colons": len(re.findall(r": ", re.sub(r"\([^()]*\)", "", said))) > 1,
        "no full stop": re.search(r"[^.]\.$", said) is None,
        "a full stop in brackets": re.search(r"[^.]\.\)", said) is not None,
        "a capital": re.match(r"[A-Z][a-z]*[ ,']", said) is not None,
    }
    return [what for what, is_so in found.items() if is_so]


def told(source: str) -> Iterator[tuple[int, str]]:
    """The line and the text of what is raised, warned of or printed as an error."""
    tree = ast.parse(source)
    caught = {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.name}
    made: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                made.setdefault(name, []).append(value)
            case ast.FunctionDef(name=name):
                returns = (each for each in ast.walk(node) if isinstance(each, ast.Return))
                made.setdefault(name, []).extend(each.value for each in returns if each.value)

    def part_of(part: ast.expr) -> str:
        if not isinstance(part, ast.FormattedValue):
            return str(ast.literal_eval(part))
        value = re.sub(r"^(str|sentence)\((.*)\)$", r"\2", ast.unparse(part.value))
        return BARE if value in caught else FIELD

    def texts(node: ast.expr) -> Iterator[tuple[int, str]]:
        """Of an expression, as far as it, variables and functions of the file show them."""
        match node:
            case ast.Constant(value=str(text)):
                yield node.lineno, text
            case ast.JoinedStr(values=parts):
                yield node.lineno, "".join(map(part_of, parts))
            case ast.IfExp(body=one, orelse=other):
                yield from (*texts(one), *texts(other))
            case ast.Name(id=name) | ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                for each in made.pop(name, ()):  # each once, whatever its circles
                    yield from texts(each)

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and TELLING.fullmatch(ast.unparse(node.func)):
            yield from texts(node.args[0])


def told_in_cpp(source: str) -> Iterator[tuple[int, str]]:
    """The same of C++, whose literals stand between fields."""
    for found in CPP.finditer(source):
        literals = re.findall(r'"((?:[^"\\]|\\.)*)"', found[1])
        if literals:
            yield source.count("\n", 0, found.start()) + 1, FIELD.join(literals)


READERS = {".py": told, ".cpp": told_in_cpp, ".h": told_in_cpp, ".cu": told_in_cpp}


def test_every_message_is_one_sentence_with_its_advice_last() -> None:
    found, count = set(), 0
    for folder in ("qsdp", "launch", "benchmarks", "csrc"):
        for file in (path for path in (ROOT / folder).rglob("*") if path.suffix in READERS):
            for line, text in READERS[file.suffix](file.read_text()):
                count += 1
                if wrong := mistakes(text):
                    found.add(f"{file.relative_to(ROOT)}:{line}: {', '.join(wrong)}: {text!r}")
    assert not found, "\n".join(sorted(found))
    assert count > 500


TRY = "try: f()\nexcept OSError as e:\n  raise"


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ('raise ValueError(f"x is {x}; choose 2 to 8.")', "a semicolon"),
        ('raise ValueError(f"the reduce fails: nodes differ: set {x}.")', "two colons"),
        ('raise ValueError(f"x is {x}: choose 2 to 8")', "no full stop"),
        ('raise Mistake(f"x is {x}: choose 2 to 8..")', "no full stop"),
        ('sys.exit("error: The rank is 3: choose 2.")', "a capital"),
        ('mistake = f"x is {x}"\nraise RuntimeError(mistake)', "no full stop"),
        ('def said(x):\n  return f"x is {x}"\nraise RuntimeError(said(3))', "no full stop"),
        (f"{TRY} UserError(f'no x ({{e}}): give one.')", "a full stop in brackets"),
        (f"{TRY} UserError(f'--x: {{str(e)}}.')", "a full stop in brackets"),
    ],
)
def test_a_message_that_is_none_is_seen(source: str, wrong: str) -> None:
    assert {each for _, text in told(source) for each in mistakes(text)} == {wrong}


@pytest.mark.parametrize("text", ['"x is ", x, "; give 1."', '"x is ", x, ": give ", 1'])
def test_a_message_of_a_kernel_that_is_none_is_seen(text: str) -> None:
    assert all(mistakes(said) for _, said in told_in_cpp(f"refuse({text});"))
