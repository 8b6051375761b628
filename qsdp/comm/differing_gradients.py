"""What ends a reduce of ranks that have different gradients."""

from __future__ import annotations


class GradientsDiffer(Exception):
    """Raised for differing gradients: some ranks have the agreed ones to reduce, and some others.

    See [Note: Consensus] in ``gradient_consensus.py``.
    """
