"""Initial weights of a GPT-2."""

from __future__ import annotations

import math

from torch import nn

from qsdp.models.gpt2.model import Block
from qsdp.models.initial_weights import fill_parameters

INIT_STD = 0.02  # GPT-2's, for every matrix and both embeddings


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill the parameters of a GPT in place with ``fill_parameters``, whose errors it raises.

    Matrices are normal with standard deviation 0.02, the projections that write into the residual
    stream divided by sqrt(2 num_layers) (Radford et al., 2019).
    """
    num_layers = sum(isinstance(module, Block) for module in model.modules())

    def std_of(name: str) -> float:
        is_last = name.endswith(("attn.out.weight", "mlp.down.weight"))
        return INIT_STD / math.sqrt(2 * num_layers) if is_last else INIT_STD

    fill_parameters(model, seed, std_of)
