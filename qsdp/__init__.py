"""FSDP2 training with 2- to 8-bit communication and models that compress in one shot."""

from qsdp.config import QSDPConfig
from qsdp.fsdp.install import Handle, install

__version__ = "0.1.0"
__all__ = ["Handle", "QSDPConfig", "install"]
