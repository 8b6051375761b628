"""Groups of settings, whose fields are the flags of a command line. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


def flag(name: str) -> str:
    """The flag of the field ``name``."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A group of settings.

    The flags of all groups of a command are one list: no name of a field stands in two of them.
    """

    def values(self) -> dict[str, Any]:
        """All fields, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def stored(self) -> dict[str, Any]:
        """The fields that are set, by name, as JSON and TOML can hold them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.values().items()
            if value is not None
        }

    def require(self, name: str, holds: bool, allowed: str) -> None:
        """Raise ValueError, which says what is ``allowed``, unless the field's value ``holds``."""
        if not holds:
            raise ValueError(f"{flag(name)} is {getattr(self, name)!r}: {allowed}.")

    def require_contents(self, name: str) -> None:
        """Raise ValueError for a field that was given, but with nothing in it."""
        if getattr(self, name) in ("", ()):
            raise ValueError(f"{flag(name)} is empty: give a value, or leave it out.")

    def as_given(self, name: str) -> str:
        """The flag that gave the field ``name`` its value."""
        return f"--{'no-' if getattr(self, name) is False else ''}{flag(name)[2:]}"
