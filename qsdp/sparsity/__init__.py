"""Masks and thresholds over sharded tensors, and what a model is compressed to."""
