"""Per-rank optimizers over sharded parameters, and gradient clipping that knows shards."""

from qsdp.optim.cram import SAM, CrAM
from qsdp.optim.masked import ACDC, GMP
from qsdp.optim.norms import clip_grad_norm_, global_grad_norm

__all__ = ["ACDC", "GMP", "SAM", "CrAM", "clip_grad_norm_", "global_grad_norm"]
