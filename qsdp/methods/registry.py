"""The training methods, by the field that chooses each. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from functools import cache

from qsdp.common.flags import flag
from qsdp.common.registered import held_by_registered
from qsdp.methods.method import Method

METHODS = {
    "cram": "qsdp.methods.cram.flags",
    "acdc": "qsdp.methods.acdc.flags",
    "gmp": "qsdp.methods.gmp.flags",
    "sam": "qsdp.methods.sam.flags",
}
"""Modules whose ``METHOD`` is a class of flags."""

FOLDERS_OF_EVERY_RUN = ("checkpoints", "plots", "tensorboard")
"""Folders of results in which no method may keep models."""


@cache
def method_classes() -> dict[str, type[Method]]:
    """The flags of each method in the registry.

    Raises ValueError for one that lacks them, whose flags have no defaults or are not named after
    it, or that keeps models in a folder of others.
    """
    found = {key: _method_class_of(module) for key, module in METHODS.items()}
    folders = [*FOLDERS_OF_EVERY_RUN]
    for key, method in found.items():
        names = [field.name for field in fields(method)]
        odd = [name for name in names if name != key and not name.startswith(f"{key}_")]
        if method.KEY != key or key not in names or odd:
            raise ValueError(
                f"the method {key!r} has KEY {method.KEY!r} and the fields "
                f"{', '.join(names) or 'of no dataclass'}: "
                f"name its fields {key} and {key}_..., and its KEY {key!r}."
            )
        for field in fields(method):
            if field.default is MISSING:
                raise ValueError(
                    f"the method {key!r} has no default for {field.name}, which every run has: "
                    "give it one that no run can change, such as a number or a tuple."
                )
        if taken := {*method.FOLDERS} & {*folders}:
            raise ValueError(
                f"the method {key!r} keeps models in {sorted(taken)[0]!r}, which is the folder of "
                "others: choose another name."
            )
        folders += method.FOLDERS
    return found


def _method_class_of(module: str) -> type[Method]:
    method = held_by_registered(module, "METHOD")
    if isinstance(method, type) and issubclass(method, Method):
        return method
    raise ValueError(
        f"METHOD in {module} is {method!r}: let it be the class of the method's flags, which "
        "derives from Method."
    )


def unchosen() -> tuple[Method, ...]:
    """All methods of the registry, none of which is chosen."""
    return tuple(method() for method in method_classes().values())


def chosen(methods: Sequence[Method]) -> Method:
    """The method that is chosen of the registry's; plain AdamW where none is."""
    return next((method for method in methods if method.is_chosen), Method())


def check_methods(methods: Sequence[Method], steps: int) -> None:
    """Raise ValueError, naming the flag, if no run of ``steps`` can have the registry's method."""
    keys = [method.KEY for method in methods if method.is_chosen]
    if len(keys) > 1:
        raise ValueError(f"{flag(keys[0])} and {flag(keys[1])} are both given: choose one method.")
    for method in methods:
        method.check_values()  # of what is empty too, where it says more
        for name in method.values():
            method.require_contents(name)
    check_all_heeded(methods)
    chosen(methods).check_run(steps)


def check_all_heeded(methods: Sequence[Method], given: Iterable[str] | None = None) -> None:
    """Raise ValueError if a field that was ``given`` has no effect on any method registered.

    See ``Method.check_heeded``. Unset: those that are not as they are by default.
    """
    for method in methods:
        method.check_heeded(method.given if given is None else given)


def replaced() -> dict[str, str]:
    """Fields of all methods in the registry by others that stand in place of them."""
    return {old: new for method in method_classes().values() for old, new in method.INSTEAD.items()}


def kept_folders() -> tuple[str, ...]:
    """Folders of results in which the methods of the registry keep models."""
    return tuple(name for method in method_classes().values() for name in method.FOLDERS)
