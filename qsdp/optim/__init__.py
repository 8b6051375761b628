"""Per-rank optimizers over sharded parameters, and gradient clipping that knows shards."""

from qsdp.optim.base import clip_grad_norm_, global_grad_norm
from qsdp.optim.cram import CrAM

__all__ = ["CrAM", "clip_grad_norm_", "global_grad_norm"]
