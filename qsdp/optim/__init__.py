"""Per-rank optimizers over sharded parameters, and gradient clipping that knows shards."""

from qsdp.optim.base import clip_grad_norm_, global_grad_norm
from qsdp.optim.cram import SAM, CrAM
from qsdp.optim.masked import ACDC, GMP

__all__ = ["ACDC", "GMP", "SAM", "CrAM", "clip_grad_norm_", "global_grad_norm"]
