"""Names of files that come out of files: what a folder says of itself is not to lead out of it."""

from __future__ import annotations


def is_file_name(name: object) -> bool:
    """Whether `name` is that of something in a folder: no path, and not the folder above."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
    )
