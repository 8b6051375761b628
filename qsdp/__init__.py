"""FSDP2 training with 2- to 8-bit communication and models that compress in one shot.

Names load when they are first used: what needs FSDP2 takes seconds to import, a command line that
only answers `--help` should not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsdp.config import QSDPConfig
    from qsdp.fsdp.install import Handle, install
    from qsdp.optim import CrAM, clip_grad_norm_
    from qsdp.simulation import Simulation, simulate

__version__ = "0.1.0"
__all__ = [
    "CrAM",
    "Handle",
    "QSDPConfig",
    "Simulation",
    "clip_grad_norm_",
    "install",
    "simulate",
]

_HOMES = {
    "CrAM": "qsdp.optim",
    "Handle": "qsdp.fsdp.install",
    "QSDPConfig": "qsdp.config",
    "Simulation": "qsdp.simulation",
    "clip_grad_norm_": "qsdp.optim",
    "install": "qsdp.fsdp.install",
    "simulate": "qsdp.simulation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qsdp' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
