"""A toy of one block, sharded after its optimizer was made, as libraries do."""

from __future__ import annotations

from typing import Any

from torch import nn

import qsdp
from tests.support.optimizers import all_bits
from tests_distributed.support.helpers import Toy, full_state, make_model, shard, wire_config


def small_toy() -> Toy:
    return make_model(1, num_layers=1)


def whole_bits(model: nn.Module) -> dict[str, Any]:
    """Bits of the whole weights (a collective)."""
    return all_bits(full_state(model))


def tell(optimizer: Any, model: nn.Module, wire_bits: int | None) -> None:
    if wire_bits is not None:
        config = wire_config(16, weight_bits=wire_bits, grad_bits=wire_bits)
        optimizer.share_support(qsdp.install(model, config).set_support)


def prepare(model: Toy, optimizer: Any, in_place: bool) -> None:
    """What libraries do that prepare model and optimizer together."""
    names = {id(p): name for name, p in model.named_parameters()}
    slots = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    shard(model)
    sharded = dict(model.named_parameters())
    for group, slot in zip(optimizer.param_groups, slots, strict=True):
        if in_place:
            for i, name in enumerate(slot):
                group["params"][i] = sharded[name]
        else:
            group["params"] = [sharded[name] for name in slot]
