"""A training with kept codes that is saved in memory, and another one that goes on from that."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import qsdp
from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.delta import (
    Masks,
    bits_of,
    decoded,
    masks_of,
    prune,
    sent_while,
    support,
)
from tests_distributed.support.helpers import Toy, make_batch, make_model, shard

COUNTS = ("changed_codes", "redrawn_buckets")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained: a toy of ``options`` with a wire of ``config``."""

    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    share: float | None = None
    """How much of the blocks' matrices is kept, if anything is pruned."""
    replicas: int = 1
    """Of native HSDP."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """All that a training goes on from."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: str
    grids: dict[str, Tensor]
    masks: Masks


class Training:
    """One on all ranks, from its beginning or from what was ``saved``."""

    def __init__(self, setting: Setting, saved: Saved | None = None) -> None:
        self.setting = setting
        mesh = None
        if setting.replicas > 1:
            shape = (setting.replicas, torch.distributed.get_world_size() // setting.replicas)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        # What goes on has other weights before it is loaded.
        model = make_model(1 if saved is None else 2, **setting.options)
        self.model: Toy = shard(model, mesh=mesh)
        config = {"weight_bits": 4, "grad_bits": 8, "bucket_size": 16, "delta_redraw_every": 3}
        self.handle = qsdp.install(
            self.model, qsdp.QSDPConfig(**{"gather": "delta", **config, **setting.config})
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, foreach=True)
        self.masks: Masks = {}
        if saved is not None:
            self.load(saved)
        elif setting.share is not None:
            self.masks = masks_of(self.model, setting.share)
            prune(self.model, self.masks)
            self.handle.set_support(support(self.model, self.masks))

    def load(self, saved: Saved, *, grids: bool = True) -> None:
        """Take all that was saved; without ``grids`` they are drawn anew."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                local_shard(parameter).values.copy_(saved.weights[name])
        self.optimizer.load_state_dict(copy.deepcopy(saved.optimizer))
        self.masks = saved.masks
        if self.masks:
            self.handle.set_support(support(self.model, self.masks))
        self.handle.load_state_dict(json.loads(saved.state))
        if grids:
            self.handle.load_grids(saved.grids)

    def save(self) -> Saved:
        """All that another one needs to go on."""
        return Saved(
            weights={n: local_shard(p).values.clone() for n, p in self.model.named_parameters()},
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
            state=json.dumps(self.handle.state_dict()),
            grids=self.handle.grids(),
            masks=self.masks,
        )

    def validate(self) -> None:
        """A forward pass beside the training."""
        self.model.eval()
        with torch.no_grad():
            self.model(*make_batch(self.model, 100))
        self.model.train()

    def take(self, steps: Sequence[int]) -> list[Any]:
        """All that ``steps`` come to: losses, weights, decoded ones, and what was sent of them.

        Of the first one only what does not depend on whether all codes had to be sent.
        """
        found: list[Any] = []
        for step in steps:
            losses = list[float]()
            counts = sent_while(self.handle, partial(self._step, step, losses))
            found.append((losses, [counts[name] for name in COUNTS] if step > steps[0] else None))
        return [
            *found,
            bits_of(dict(self.model.named_parameters())),
            bits_of(decoded(self.model)),
            bits_of(self.handle.grids()),
            self.handle.state_dict(),
        ]

    def _step(self, step: int, losses: list[float]) -> None:
        loss: Tensor = self.model(*make_batch(self.model, step))
        torch.autograd.backward(loss)
        losses.append(float(loss.detach()))
        self.optimizer.step()
        self.optimizer.zero_grad()
        prune(self.model, self.masks)
