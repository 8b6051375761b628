"""A tiny language model and its data, for transformers' Trainer and its subclasses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

VOCAB, LENGTH = 96, 16


class Tokens(Dataset[dict[str, Tensor]]):
    """Sequences that count up from places of their own."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.num:
            raise IndexError(index)
        tokens = 3 + (index * 7 + torch.arange(LENGTH)) % (VOCAB - 3)
        return {"input_ids": tokens, "labels": tokens.clone()}


def tiny_llama(**options: Any) -> Any:
    """A Llama of two layers, width 32, with random weights that are the same on every rank."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **options,
    )
    return AutoModelForCausalLM.from_config(config).train()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, whole."""
    return {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}  # type: ignore[operator]


def arguments(folder: str, kind: Any = None, **options: Any) -> Any:
    """``TrainingArguments``, or those of ``kind``, for a short training of a few steps."""
    from transformers import TrainingArguments

    return (kind or TrainingArguments)(
        output_dir=folder,
        **{
            "use_cpu": True,
            "fsdp": True,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 3,
        }
        | options,
    )
