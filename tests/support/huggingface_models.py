"""A small GPT-2 of Hugging Face's and one of ours, of the same size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.init import init_weights
from qsdp.models.gpt2.model import GPT

SIZE: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 13, "n_positions": 6}


def their_model(**options: Any) -> Any:
    """A small GPT2LMHeadModel whose every parameter, biases and norms too, is random."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(SIZE | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def our_model(**changes: Any) -> GPT:
    fields = {"vocab_size": 13, "num_layers": 2, "num_heads": 2, "width": 8, "context": 6}
    model = GPT(GPTConfig(**(fields | changes)))
    init_weights(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()
