"""Parameters that are trained again between a forward pass and its backward pass."""

from __future__ import annotations

from typing import Any

import qsdp
from tests_distributed.support.helpers import full_grads, make_batch, make_model, shard
from tests_distributed.support.running import Run


def _grads(unfreezes: bool) -> Any:
    model = shard(make_model(frozen=True))
    qsdp.install(
        model, qsdp.QSDPConfig(weight_bits=32, grad_bits=32, embedding_bits=32, gather="once")
    )
    frozen = [p for p in model.parameters() if not p.requires_grad]
    loss = model(*make_batch(model, 0))
    for parameter in frozen if unfreezes else ():
        parameter.requires_grad_(True)
    loss.backward()
    return full_grads(model)


def test_the_backward_pass_has_the_weights_of_what_was_unfrozen_after_the_forward_pass(
    run: Run,
) -> None:
    for found, expected in zip(run(2, _grads, True), run(2, _grads, False), strict=True):
        assert all(found[name].equal(expected[name]) for name in expected)
