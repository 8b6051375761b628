"""What ends a reduce of ranks that have different gradients."""

from __future__ import annotations


class GradientsDiffer(Exception):
    """Some ranks have the agreed gradients to reduce, and some have differing ones.

    See [Note: Consensus] in ``gradient_consensus.py``.
    """
