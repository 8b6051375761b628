"""Masks and thresholds over sharded tensors, and what a model is compressed to."""

from qsdp.sparsity.compression import compressed, magnitude_masks
from qsdp.sparsity.prunable import prunable_parameters
from qsdp.sparsity.target import Compression

__all__ = ["Compression", "compressed", "magnitude_masks", "prunable_parameters"]
