"""How another error is quoted within a sentence, and things are counted."""

from __future__ import annotations

import pytest

from qsdp.common.user_errors import counted, quoted


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("x is 3: choose 2.", "x is 3: choose 2"),
        (ValueError("two\n  lines."), "two lines"),
        (f"MemoryError: {MemoryError()}", "MemoryError"),
        (OSError(2, "No such file", "a/b"), "a/b: No such file"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_an_error_in_a_sentence_has_no_end_of_its_own(error: Exception | str, said: str) -> None:
    assert quoted(error) == said


def test_what_is_cut_off_ends_as_nicely() -> None:
    assert quoted("a failure: of disks.", 10) == "a failure"


def test_one_thing_is_no_plural() -> None:
    assert [counted(n, "parameter") for n in (0, 1)] == ["0 parameters", "1 parameter"]
