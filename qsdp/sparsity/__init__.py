"""Masks and thresholds over sharded tensors."""

from qsdp.sparsity.masks import magnitude_masks, prunable_parameters, pruned

__all__ = ["magnitude_masks", "prunable_parameters", "pruned"]
