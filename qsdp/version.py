"""The version of this package: what all ranks of a run must share."""

__version__ = "0.1.0"
