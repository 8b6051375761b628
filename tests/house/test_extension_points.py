"""What is extended is named where it lives, and by nobody who uses it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import pytest

from qsdp.methods.registry import method_classes
from qsdp.models.registry import FAMILIES, preset_defaults
from tests.house.test_imports import PACKAGE, imports_of

USERS = ("train", "export", "report", "commands")
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
    for room in USERS
    for path in sorted((PACKAGE / room).rglob("*.py"))
}
MODEL_FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("models/*/__init__.py"))
METHOD_FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("methods/*/__init__.py"))
METHOD_WORDS = (
    *method_classes(),
    *(method.NAME for method in method_classes().values()),
    *METHOD_FOLDERS,
)
MODEL_WORDS = (*FAMILIES, *preset_defaults(), "GPT", *MODEL_FOLDERS)


def names_said(room_sources: Mapping[str, str], words: Iterable[str]) -> list[str]:
    """``path: word`` for each of ``words`` that a source says, in code or in a comment.

    A word stands alone, or as a part of a name (``GPTConfig``, ``nano_size``), but not inside a
    longer word (``minimum``). What the script launch/train_gpt.py is called may be said.
    """
    said = []
    for path, text in room_sources.items():
        rest = text.replace("train_gpt", "")
        for word in words:
            if re.search(rf"(?<![a-zA-Z])(?i:{re.escape(word)})(?![a-z]|[A-Z](?![a-z]))", rest):
                said.append(f"{path}: {word}")
    return said


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("from qsdp.models.gpt2.model import GPT", "gpt2"),
        ("size: GPTConfig", "GPT"),
        ('"""As GPT-2 has it."""', "GPT"),
        ('model = "nano"', "nano"),
        ("nano_size = 3", "nano"),
    ],
)
def test_a_name_that_is_said_is_seen(text: str, word: str) -> None:
    assert names_said({"train/x.py": text}, [word]) == [f"train/x.py: {word}"]


@pytest.mark.parametrize("text", ["launch/train_gpt.py", "a minimum", "nanoseconds", "in models"])
def test_a_longer_word_is_not_taken_for_a_name(text: str) -> None:
    assert names_said({"train/x.py": text}, ["gpt", "mini", "nano", "model"]) == []


def imported(room: str, folders: Iterable[str]) -> set[str]:
    """What the users import of these folders of a room."""
    return {
        f"{path}: {module}"
        for path in SOURCES
        for module in imports_of(PACKAGE / path, PACKAGE)
        if any(f"{module}.".startswith(f"qsdp.{room}.{folder}.") for folder in folders)
    }


def test_who_trains_or_writes_models_names_no_family() -> None:
    assert len(SOURCES) > 20
    assert len(MODEL_WORDS) > 10
    assert "gpt2" in MODEL_FOLDERS
    assert names_said(SOURCES, MODEL_WORDS) == []
    assert imported("models", MODEL_FOLDERS) == set()


def test_who_trains_or_compresses_names_no_method() -> None:
    assert {"acdc", "AC/DC", "cram", "CrAM"} <= {*METHOD_WORDS}
    assert names_said(SOURCES, METHOD_WORDS) == []
    assert imported("methods", METHOD_FOLDERS) == set()


def test_every_method_has_a_line_in_the_registry() -> None:
    assert sorted(method_classes()) == METHOD_FOLDERS
