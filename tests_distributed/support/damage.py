"""Payloads that are damaged on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import qsdp
from qsdp.comm import transport
from tests_distributed.support.helpers import make_batch, make_model, shard


def damaged(direction: str, byte: int, bit: int) -> str:
    model = shard(make_model())
    qsdp.install(model)
    torch.autograd.backward(model(*make_batch(model, 0)))

    def damage(received: Tensor) -> None:
        # Of the first rank's payload, or of the second's, which is the first that it receives.
        if received.dtype == torch.uint8:  # not what ranks agree on before they send payloads
            received[byte] ^= 1 << bit

    wait = transport.Arrival.wait

    def damaged_on_the_way(arrival: Any) -> Tensor | None:
        seen = wait(arrival)
        assert seen is not None
        damage(seen)
        return seen

    try:
        if direction == "gather":
            transport.Arrival.wait = damaged_on_the_way  # type: ignore[method-assign]
            torch.autograd.backward(model(*make_batch(model, 1)))
        else:
            loss = model(*make_batch(model, 1))
            transport.Arrival.wait = damaged_on_the_way  # type: ignore[method-assign]
            torch.autograd.backward(loss)
    except RuntimeError as error:
        return str(error)
    finally:
        transport.Arrival.wait = wait  # type: ignore[method-assign]
    return "trained on garbage"
