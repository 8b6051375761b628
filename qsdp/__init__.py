"""FSDP2 training with 2- to 8-bit communication and models that compress in one shot.

Names load when they are first used: what needs FSDP2 takes seconds to import, a command line that
only answers `--help` should not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qsdp.version import __version__ as __version__

if TYPE_CHECKING:
    from qsdp.config import QSDPConfig
    from qsdp.fsdp.install import Handle, install
    from qsdp.optim import CrAM, clip_grad_norm_

__all__ = ["CrAM", "Handle", "QSDPConfig", "clip_grad_norm_", "install"]

_HOMES = {
    "CrAM": "qsdp.optim",
    "Handle": "qsdp.fsdp.install",
    "QSDPConfig": "qsdp.config",
    "clip_grad_norm_": "qsdp.optim",
    "install": "qsdp.fsdp.install",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qsdp' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
