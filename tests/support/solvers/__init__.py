"""Solvers beside those of qsdp, for what is the same for all of them."""
