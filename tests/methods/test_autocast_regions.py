"""One region of ``torch.autocast``, which keeps what it casts, around passes of other weights."""

from __future__ import annotations

import copy

import pytest
import torch

import qsdp
from tests.support.optimizers import METHODS, closure_of
from tests_distributed.support.helpers import make_batch, make_model


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_a_region_each_pass(method: str) -> None:
    trained = []
    for keeps in (True, False):
        model = make_model(1)
        optimizer = METHODS[method](model, torch.optim.SGD(model.parameters(), lr=0.1))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
            losses = [float(optimizer.step(closure_of(model, model, step))) for step in range(4)]
        trained.append((losses, copy.deepcopy(model.state_dict())))
    (losses, weights), (expected, expected_weights) = trained
    assert losses == expected
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)


def test_a_model_compressed_for_a_while_is_evaluated_so() -> None:
    model = make_model(1)
    batch = make_batch(model, 1, rank=0)
    losses = {}
    for keeps in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
            losses[keeps] = [float(model(*batch))]
            with qsdp.compressed(model, 0.9):
                losses[keeps].append(float(model(*batch)))
            losses[keeps].append(float(model(*batch)))
    assert losses[True] == losses[False]
    assert losses[True][0] == losses[True][2] != losses[True][1]
