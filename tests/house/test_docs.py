"""What documents and comments point to exists."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import qsdp
from tests.support import recipes

ROOT = Path(__file__).parents[2]
_PLACES = ("", "qsdp/", "csrc/")  # what a path may leave out
_PATH = r"(?:[\w-]+/)+[\w.-]*\.(?:py|md|h|cpp|cu|sh|sbatch|yaml|toml)\b"
_FOLDER = r"(?<![\w./-])((?:qsdp|csrc|tests|tests_distributed)/[a-z_/]*[a-z])(?![\w./-])"
FOLDERS = ("benchmarks", "csrc", "docker", "docs", "launch", "qsdp", "tests", "tests_distributed")
FILES = {
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*")))
    if path.is_file()
}
TEXTS = {
    name: (ROOT / name).read_text()
    for name in sorted(FILES)
    if not name.startswith("tests") and name.endswith((".md", ".py", ".h", ".cpp", ".cu"))
}
DOCUMENTS = {name: text for name, text in TEXTS.items() if name.endswith(".md")}
# What a recipe makes is there when it has been carried out.
MADE = {
    path
    for name, text in DOCUMENTS.items()
    if name.startswith("docs/extend")
    for recipe in recipes.read(text, name)
    for path in recipe.files - recipe.edited
}


def found(path: str) -> str | None:
    """The file that ``path`` stands for."""
    return next((place + path for place in _PLACES if place + path in FILES | MADE), None)


def is_ours(path: str) -> bool:
    """Whether ``path`` begins in a folder of the repository."""
    return any((ROOT / place / path.split("/")[0]).is_dir() for place in _PLACES)


def missing_paths() -> Iterator[str]:
    for name, text in TEXTS.items():
        for path in re.findall(rf"(?<![\w./<-])({_PATH})", text):
            if is_ours(path) and found(path) is None:
                yield f"{name}: {path}"
        # In Python such a text may be a name of something else.
        for folder in [] if name.endswith(".py") else re.findall(_FOLDER, text):
            if not (ROOT / folder).is_dir():
                yield f"{name}: {folder}"
    names = {Path(each).name for each in FILES}
    for name, text in DOCUMENTS.items():
        for file in re.findall(r"`([\w-]+\.(?:py|h|cpp|cu))`", text):
            if file not in names:
                yield f"{name}: {file}"


def missing_names() -> Iterator[str]:
    """Of "``name`` in path", and notes of "[Note: Name] in path"."""
    for name, text in TEXTS.items():
        for what, path in re.findall(rf"`(\w+)``?\s+in\s+`{{0,2}}({_PATH})", text):
            file = found(path)
            source = TEXTS.get(file or "", "")
            if not re.search(rf"(?m)^( *(def|class) )?{what}\b", source):
                yield f"{name}: {what} in {path}"
        for notes, path in re.findall(rf"((?:\[Note: \w+\][ ,and]*)+)in\s+`{{0,2}}({_PATH})", text):
            for note in re.findall(r"\[Note: \w+\]", notes):
                if note not in TEXTS[found(path) or name]:
                    yield f"{name}: {note} in {path}"


def missing_attributes() -> Iterator[str]:
    for name, text in TEXTS.items():
        for dotted in re.findall(r"`qsdp\.([\w.]*\w)", text):
            if not exists(dotted):
                yield f"{name}: qsdp.{dotted}"
        for attribute in re.findall(r"`handle\.(\w+)", text):
            source = TEXTS["qsdp/fsdp/handle.py"]
            if not hasattr(qsdp.Handle, attribute) and f"self.{attribute} =" not in source:
                yield f"{name}: handle.{attribute}"


def exists(dotted: str) -> bool:
    """Whether qsdp has it: an attribute, or a module; of an adapter the library may be absent."""
    if dotted.startswith("integrations."):
        _, adapter, *names = dotted.split(".")
        source = TEXTS.get(f"qsdp/integrations/{adapter}.py", "")
        return bool(source) and all(
            f"\ndef {n}(" in source or f"\nclass {n}" in source for n in names
        )
    whole: object = qsdp
    path = "qsdp"
    for part in dotted.split("."):
        path += f".{part}"
        if not hasattr(whole, part):
            try:
                importlib.import_module(path)
            except ImportError:
                return False
        whole = getattr(whole, part)
    return True


def test_paths_that_are_named_exist() -> None:
    assert [*missing_paths()] == []


def test_names_are_where_they_are_said_to_be() -> None:
    assert [*missing_names()] == []


def test_what_is_said_to_be_of_qsdp_is() -> None:
    assert [*missing_attributes()] == []


def test_design_has_a_place_for_every_room_and_for_every_file_of_the_lowest_ones() -> None:
    rooms = TEXTS["docs/design.md"].partition("## Rooms")[2].partition("\n## ")[0]
    lowest = [ROOT / "qsdp" / room for room in ("codec", "common", "ops")]
    files = [ROOT / "qsdp/config.py", *(file for room in lowest for file in room.glob("*.py"))]
    assert [file.name for file in files if file.stem[0] != "_" and file.name not in rooms] == []
    folders = {path.parent.name for path in ROOT.glob("qsdp/*/__init__.py")}
    assert len(folders) > 10
    assert [name for name in sorted(folders) if f"`{name}`" not in rooms] == []
