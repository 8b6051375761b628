"""FSDP2 training with 2- to 8-bit communication and models that compress in one shot.

Names load when they are first used: what needs FSDP2 takes seconds to import, and a command line
that only answers ``--help`` should not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsdp.config import QSDPConfig
    from qsdp.fsdp.handle import Handle
    from qsdp.fsdp.install import install
    from qsdp.methods.acdc.optimizer import ACDC
    from qsdp.methods.acdc.schedule import ACDCSchedule
    from qsdp.methods.clip_grad import clip_grad_norm_
    from qsdp.methods.cram.optimizer import CrAM
    from qsdp.methods.gmp.optimizer import GMP
    from qsdp.methods.gmp.schedule import GMPSchedule
    from qsdp.methods.sam.optimizer import SAM
    from qsdp.oneshot.in_memory import compressed
    from qsdp.simulation import Simulation, simulate
    from qsdp.sparsity.compression_target import Compression

__version__ = "0.1.0"
__all__ = [
    "ACDC",
    "GMP",
    "SAM",
    "ACDCSchedule",
    "Compression",
    "CrAM",
    "GMPSchedule",
    "Handle",
    "QSDPConfig",
    "Simulation",
    "clip_grad_norm_",
    "compressed",
    "install",
    "simulate",
]

_HOMES = {
    "ACDC": "qsdp.methods.acdc.optimizer",
    "ACDCSchedule": "qsdp.methods.acdc.schedule",
    "Compression": "qsdp.sparsity.compression_target",
    "CrAM": "qsdp.methods.cram.optimizer",
    "GMP": "qsdp.methods.gmp.optimizer",
    "GMPSchedule": "qsdp.methods.gmp.schedule",
    "Handle": "qsdp.fsdp.handle",
    "QSDPConfig": "qsdp.config",
    "SAM": "qsdp.methods.sam.optimizer",
    "Simulation": "qsdp.simulation",
    "clip_grad_norm_": "qsdp.methods.clip_grad",
    "compressed": "qsdp.oneshot.in_memory",
    "install": "qsdp.fsdp.install",
    "simulate": "qsdp.simulation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qsdp' has no attribute {name!r}.")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
