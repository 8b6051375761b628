"""Ranks whose groups got different gradients, or meet in different groups, are told which."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import qsdp
from tests_distributed.support.apart import APART, noise, tower, train_apart
from tests_distributed.support.helpers import full_grads
from tests_distributed.support.pool import GLOO_TIMEOUT_S
from tests_distributed.support.running import Run


@pytest.mark.parametrize("case", APART)
@pytest.mark.parametrize(("ranks", "hops"), [(2, 1), (3, 1), (4, 2)])
def test_ranks_with_other_gradients_than_their_peers_raise_and_name_the_parameters(
    run: Run, case: str, ranks: int, hops: int
) -> None:
    steps, layer = APART[case]
    odd = random.randrange(ranks)
    config = {"ranks_per_node": ranks // hops, "reduce": "two-hop" if hops > 1 else "flat"}
    for message, seconds in run(ranks, train_apart, steps, odd, config):
        names = rf"blocks\.1\.{layer}\.weight and blocks\.1\.{layer}\.bias"
        said = rf"rank \d has no gradient of {names} to reduce, but rank \d has: use the same"
        assert re.match(said, message), message
        assert "\n" not in message
        assert seconds < GLOO_TIMEOUT_S / 2


def _change_together(config: dict[str, Any] | None) -> tuple[list[dict[str, Tensor]], list[int]]:
    model, handle = tower(config)
    grads, sent = [], []
    for step, chosen in enumerate(["left", "left right", "left right", "wide", "wide left"]):
        torch.autograd.backward(model(noise(step), chosen, "left"))
        grads.append(full_grads(model))
        model.zero_grad()
        if handle is not None:
            sent.append(handle.traffic.snapshot()["reduce_sent_bytes"])
    return grads, sent


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_set_that_changes_on_all_ranks_costs_one_exchange_of_the_old_one(
    run: Run, ranks: int
) -> None:
    full = {"weight_bits": 32, "grad_bits": 32}
    stock = run(ranks, _change_together, None)
    ours = run(ranks, _change_together, full)
    for (expected, _), (found, sent) in zip(stock, ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        total = [0, *sent]
        per_step = [after - before for before, after in pairwise(total)]
        # The counters show payloads of reduces that took place, each once.
        assert per_step[1] == per_step[2] > per_step[0]


def _unused_as_zeros(odd: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    both = []
    for config in (None, {"weight_bits": 32, "grad_bits": 32}):
        model, _ = tower(config)
        model.set_reduce_scatter_unused_params(True)
        chosen = "left" if dist.get_rank() == odd else "left right"
        torch.autograd.backward(model(noise(0), "left right", chosen))
        both.append(full_grads(model))
    return both[0], both[1]


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="came with torch 2.13"
)
def test_what_the_message_advises_helps(run: Run) -> None:
    for stock, ours in run(3, _unused_as_zeros, 1):
        assert "blocks.1.right.weight" in ours
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


class Three(nn.Sequential):
    """Three layers of one size, of which one rank leaves out the second, and others the third."""

    odd: int

    def forward(self, x_BC: Tensor) -> Tensor:
        y_BC: Tensor = self[1 + (dist.get_rank() == self.odd)](self[0](x_BC))
        return y_BC


def _skip_a_block(odd: int, as_wholes: bool) -> str:
    torch.manual_seed(1)
    model: Any = Three(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model.odd = odd
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    if not as_wholes:
        fully_shard(model, mesh=mesh)
    qsdp.install(model)
    try:
        model(noise(0))
    except RuntimeError as error:
        return str(error)
    return "gathered garbage"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("as_wholes", [False, True])
def test_a_gather_that_meets_that_of_another_group_is_refused(
    run: Run, ranks: int, as_wholes: bool
) -> None:
    in_a_pass = r"rank \d sent a payload with header .* for the group of [12]\."
    at_its_beginning = r"rank 1 is at a forward pass with the first group 2.*, but rank 0 with 1\."
    for message in run(ranks, _skip_a_block, 1, as_wholes):
        assert re.search(at_its_beginning if as_wholes else in_a_pass, message)
