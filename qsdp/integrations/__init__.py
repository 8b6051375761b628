"""Adapters to other libraries: one file an ecosystem, of at most 150 lines.

``integrations.NAME`` loads the file when it is first asked for, and with it the library: nothing
else in qsdp imports an adapter. What the library is installed by is the extra of the same name,
``pip install qsdp[NAME]``. docs/extend.md says how one is added.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """Load an adapter.

    Raises:
        AttributeError: There is none of that name.
        ImportError: The library that it adapts is not installed. An error inside the library, or of
            what that one lacks, comes as it is.
    """
    own = f"{__name__}.{name}"
    if name not in _names():
        names = " or ".join(_names())
        advice = f"choose {names}" if names else "add it"
        raise AttributeError(f"{own} is no adapter that is there: {advice}.")
    try:
        return import_module(own)
    except ModuleNotFoundError as error:
        if error.name is None or "." in error.name or not _is_imported_here(error, name):
            raise
        raise ImportError(
            f"{own} needs {error.name}, which is not installed: run 'pip install qsdp[{name}]'.",
            name=own,
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_names()})


def _names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def _is_imported_here(error: ModuleNotFoundError, name: str) -> bool:
    """Whether the adapter's own file asked for what is missing, not a library that it has found."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # The import system leaves frames of its own out of what it raises.
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).stem == name
