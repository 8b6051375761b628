"""What all contestants of a comparison share: sizes, the batch, and how a step is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import qsdp
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.init import init_weights
from qsdp.models.gpt2.model import GPT

LR = 1e-3
MODELS = {
    "1m": (4, 128),
    "5m": (6, 256),
    "19m": (6, 512),
    "50m": (7, 768),
    "116m": (12, 896),
    "302m": (24, 1024),
}
"""Layers and width by name, which is about the number of parameters."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for every contestant."""

    size: GPTConfig
    batch: int
    """Sequences a rank and step."""
    device: torch.device
    mesh: DeviceMesh
    alone: DeviceMesh
    """The mesh of this rank only."""
    groups: int
    """FSDP2 groups of blocks, beside the root's."""
    powersgd_rank: int
    powersgd_start: int
    """The first step whose gradients PowerSGD compresses: at least 2, for DDP."""
    seed: int = 0
    """Seed of the first weights and of all that is random on a wire."""


@dataclass(kw_only=True)
class Ready:
    """A model ready to train."""

    model: nn.Module
    """Called with (inputs_BT, targets_BT), gives (None, loss)."""
    step: Callable[[Tensor, Tensor], Tensor]
    """Trains on (inputs_BT, targets_BT), gives the loss before the step."""
    optimizer: torch.optim.Optimizer
    """What the step updates weights with; its rates may be set between steps."""
    handle: qsdp.Handle | None = None
    lead_in: int = 0
    """Steps that go another way than all that follow, and are not to be timed."""


def size_of(model: str, vocab_size: int, context: int) -> GPTConfig:
    """A model by its name in MODELS."""
    layers, width = MODELS[model]
    return GPTConfig(
        vocab_size=vocab_size,
        num_layers=layers,
        num_heads=width // 64,
        width=width,
        context=context,
    )


def parameters(size: GPTConfig) -> int:
    """Values of a model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(size).parameters())


def whole_model(setting: Setting) -> GPT:
    """The GPT that every contestant begins with, unsharded."""
    model = GPT(setting.size)
    init_weights(model, setting.seed)
    return model.to(setting.device)


def with_adamw(
    model: nn.Module,
    setting: Setting,
    handle: qsdp.Handle | None = None,
    *,
    autocast: bool = False,
    lead_in: int = 0,
) -> Ready:
    """The model with torch's AdamW; with ``autocast`` its passes compute in bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def step(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=autocast):
            _, loss = model(inputs_BT, targets_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Ready(model=model, step=step, optimizer=optimizer, handle=handle, lead_in=lead_in)
