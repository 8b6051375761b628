"""The former name of `qsdp.methods`: its optimizers, and clipping that knows shards."""

from __future__ import annotations

from qsdp.methods.acdc.optimizer import ACDC as ACDC
from qsdp.methods.clip_grad import clip_grad_norm_ as clip_grad_norm_
from qsdp.methods.cram.optimizer import CrAM as CrAM
from qsdp.methods.gmp.optimizer import GMP as GMP
from qsdp.methods.grad_norm import global_grad_norm as global_grad_norm
from qsdp.methods.sam.optimizer import SAM as SAM
