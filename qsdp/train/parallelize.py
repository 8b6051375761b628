"""From a configuration to a model that trains on many ranks: an ordered recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import qsdp
from qsdp.models import GPT, GPTConfig, init_weights
from qsdp.train.config import TrainConfig
from qsdp.train.world import World


@dataclass(frozen=True)
class Sharded:
    """A sharded model and its wire."""

    model: GPT
    handle: qsdp.Handle | None
    """None for stock FSDP2."""


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The model's size: the preset with the data's vocabulary.

    Raises ValueError for sequences longer than the preset's context.
    """
    size = GPTConfig.from_preset(config.model, vocab_size=vocab_size)
    if config.seq_len > size.context:
        raise ValueError(
            f"--seq-len is {config.seq_len}; {config.model} has a context of {size.context}."
        )
    return size


def build(config: TrainConfig, size: GPTConfig, world: World) -> Sharded:
    """Make the model of `size` on all ranks of `world`, weights initialised, wire installed.

    1. on the meta device: no rank ever holds the whole model;
    2. each block is one FSDP group, the embeddings and the last norm are the root's;
    3. the shards get memory, then their slice of the initial weights;
    4. qsdp takes over the gathers and reduces, if asked.
    """
    with torch.device("meta"):
        model = GPT(size)
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if config.precision == "bf16"
        else MixedPrecisionPolicy()
    )
    for block in model.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    model.to_empty(device=world.device)
    init_weights(model, config.seed)
    wire = config.wire
    return Sharded(model, None if wire is None else qsdp.install(model, wire))


def make_optimizer(config: TrainConfig, model: GPT) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))
