"""What is told to a user in one sentence."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake that its message, one sentence, lets the user correct."""

    def __init__(self, message: str, *, is_shared: bool = False) -> None:
        """``is_shared``: every rank raises this error, so rank 0 will print it."""
        super().__init__(message)
        self.is_shared = is_shared


def sentence(error: BaseException) -> str:
    """The message of ``error`` on one line; of an OSError, what failed on which file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


def quoted(error: BaseException | str, longest: int | None = None) -> str:
    """What ``error`` says, as it stands within another sentence.

    It is on one line, cut after ``longest`` characters, with no full stop or colon at its end.
    """
    text = error if isinstance(error, str) else sentence(error)
    return " ".join(text.split())[:longest].rstrip(" .:")


def counted(number: int, thing: str) -> str:
    """So many things, in words: "1 parameter", "2 parameters"."""
    return f"{number} {thing}{'s' * (number != 1)}"


def group_for_user(names: Sequence[str]) -> str:
    """In an error for a user, a group of parameters: the first of ``names``, how many others."""
    others = len(names) - 1
    return f"{names[0]} and {counted(others, 'other')}" if others else names[0]


def names_for_user(names: Sequence[str]) -> str:
    """In an error for a user, some names: the first ones, and how many more there are."""
    if len(names) <= 3:
        return " and ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"
