"""The former name of ``qsdp.methods``: its optimizers, and clipping that knows shards."""

from __future__ import annotations

from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.clip_grad import clip_grad_norm_
from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.gmp.optimizer import GMP
from qsdp.methods.grad_norm import global_grad_norm
from qsdp.methods.sam.optimizer import SAM

__all__ = ["ACDC", "GMP", "SAM", "CrAM", "clip_grad_norm_", "global_grad_norm"]
