"""Settings of a run in a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from qsdp.common.user_errors import UserError, quoted
from qsdp.train.config import setting_types
from qsdp.train.wire_flags import AUTO

OR_AUTO: Any = int | Literal["auto"] | None


# What a setting may be, by its type: what a file holds, and how that is told.
FILE_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    int | None: ((int,), "an integer"),
    OR_AUTO: ((int, str), f"an integer or {AUTO}"),
    float: ((int, float), "a number"),
    float | None: ((int, float), "a number"),
    str: ((str,), "a string"),
    str | None: ((str,), "a string"),
}
LISTS: dict[Any, tuple[tuple[type, ...], str]] = {
    tuple[float, ...]: ((int, float), "a list of numbers"),
    tuple[float, ...] | None: ((int, float), "a list of numbers"),
    tuple[int, ...]: ((int,), "a list of integers"),
    tuple[int, ...] | None: ((int,), "a list of integers"),
    tuple[str, ...]: ((str,), "a list of strings"),
    tuple[str, ...] | None: ((str,), "a list of strings"),
}


@cache
def file_types() -> dict[str, Any]:
    """The type of each setting, by its name.

    Raises ValueError for one that files do not hold: a run's config.toml could not be read again.
    """
    hints = setting_types()
    for name, hint in hints.items():
        if hint not in FILE_TYPES and hint not in LISTS:
            raise ValueError(
                f"the field {name} is a {hint}, which no file of settings holds: make it a bool, "
                "or an int, float, str or a tuple[..., ...] of one of these, or None beside it."
            )
    return hints


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises UserError for an unreadable file, key or value."""
    wanted = "give a TOML file, such as the config.toml of a run"
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise UserError(f"--config {path} is not a file: {wanted}.")
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): {wanted}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--config {path} is not a TOML file ({quoted(error)}): {wanted}."
        ) from None
    return typed_settings(path, settings)


def typed_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``settings`` as a file at ``path`` has them.

    Raises UserError for an unknown key or a value of another type than the setting's.
    """
    hints = file_types()
    values: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise UserError(
                f"{path} sets {key!r}, which is not a setting: choose one that --help lists."
            )
        if hints[name] in LISTS:
            types, description = LISTS[hints[name]]
            if not isinstance(value, list) or not all(_is_of_type(v, types) for v in value):
                raise UserError(f"{path} sets {key} to {value!r}: give {description}.")
            values[name] = tuple(_to_float(path, key, v) if float in types else v for v in value)
            continue
        types, description = FILE_TYPES[hints[name]]
        is_word = isinstance(value, str) and hints[name] == OR_AUTO
        if not _is_of_type(value, types) or (is_word and value != AUTO):
            raise UserError(f"{path} sets {key} to {value!r}: give {description}.")
        is_float = hints[name] in (float, float | None)
        values[name] = _to_float(path, key, value) if is_float else value
    return values


def _to_float(path: Path, key: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise UserError(
            f"{path} sets {key} to a number beyond all floats: give a smaller one."
        ) from None


def _is_of_type(value: object, types: tuple[type, ...]) -> bool:
    # To Python, true is an int: not to a user.
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))
