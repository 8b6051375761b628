"""Whatever happens to weights between gathers of changes, all ranks decode what the rule says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.delta import decoded, descend, sent_while
from tests_distributed.support.helpers import full_state, local_part, make_batch, make_model
from tests_distributed.support.running import Run, selection
from tests_distributed.support.training import State, assert_identical
from tests_distributed.support.trainings import BF16, FP32, Case, installed, simulation_of

STEPS = 5
Gather = tuple[int, State]
"""The step of the clock, and all whole weights."""


def simulated(case: Case, seed: int, gathers: list[Gather]) -> list[State]:
    """What the simulation decodes at each of ``gathers``."""
    simulation = simulation_of(case, seed)
    found = []
    for clock, weights in gathers:
        for rank, shards in enumerate(simulation.shards):
            for name, part in shards.items():
                part.data.copy_(local_part(weights[name], case.ranks, rank))
        simulation.clock = clock
        found.append(simulation.weights())
    return found


def _delta(case: Case, **config: Any) -> Case:
    return replace(case, config={"gather": "delta", **config, **case.config})


# --- edits by hand ------------------------------------------------------------------------------


def _rows(weight: Tensor, value: float) -> Tensor:
    weight[: max(1, len(weight) // 3)] = value
    return weight


def _fresh(weight: Tensor) -> Tensor:
    return torch.linspace(-1.5, 1.5, weight.numel()).sin().reshape(weight.shape)


EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda weight: weight,
    "drifts": lambda weight: weight * 1.01,
    "grows": lambda weight: weight * 3,
    "shrinks": lambda weight: weight * 0.01,
    "some zeros": lambda weight: _rows(weight, 0.0),
    "all zero": torch.zeros_like,
    "constant": lambda weight: torch.full_like(weight, 0.7),
    "not a number": lambda weight: _rows(weight, torch.nan),
    "infinite": lambda weight: _rows(weight, torch.inf),
    "huge": lambda weight: _rows(weight, -1.7e38),
    "tiny": lambda weight: _rows(weight, 1e-42),
    "fresh": _fresh,
}


def edited(case: Case, seed: int) -> list[Gather]:
    """Two states of the weights for each step."""
    draw = random.Random(seed)
    state = {
        name: p.detach().clone() for name, p in make_model(seed, **case.options).named_parameters()
    }
    gathers = []
    for clock in range(STEPS):
        for _ in range(2):
            state = {name: EDITS[draw.choice([*EDITS])](w.clone()) for name, w in state.items()}
            gathers.append((clock, state))
    return gathers


def _decoded_after_edits(case: Case, seed: int) -> list[State]:
    model, handle = installed(case, seed)
    found = []
    for i, (_, weights) in enumerate(edited(case, seed)):
        for name, parameter in model.named_parameters():
            mine = local_shard(parameter)
            part = local_part(weights[name], case.ranks, dist.get_rank())
            mine.values.copy_(part.reshape(mine.values.shape))
        if i % 3 == 1:
            with handle.exact():
                assert_identical(
                    decoded(model), {n: w.to(case.dtypes[0]) for n, w in weights.items()}
                )
        found.append(decoded(model))
        if i % 2:
            torch.autograd.backward(model(*make_batch(model, i)))
            descend(model.parameters(), rate=0.0)
    return found


WALKS = {
    "2 bits": Case(config={"weight_bits": 2, "weight_bucket_size": 16}, options={"frozen": True}),
    "4 bits": Case(ranks=3, reshard=None, config={"weight_bits": 4, "delta_redraw_every": 2}),
    "8 bits": Case(
        ranks=4, dtypes=(BF16, FP32), config={"weight_bits": 8, "weight_bucket_size": 8}
    ),
    "nearest": Case(
        ranks=3, config={"weight_bits": 3, "rounding": "nearest"}, options={"tied": True}
    ),
}


@selection("walk", [("2 bits",), ("nearest",)], WALKS)
def test_edited_weights_are_decoded_as_the_rule_says(run: Run, walk: str) -> None:
    case, seed = _delta(WALKS[walk]), random.randrange(1 << 30)
    (expected,) = run(1, simulated, case, seed, edited(case, seed))
    for found in run(case.ranks, _decoded_after_edits, case, seed):
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            where = f"gather {i}, seed {seed}"
            torch.testing.assert_close(
                ours,
                theirs,
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=lambda text, w=where: f"{w}: {text}",
            )


# --- blocks that are passed through again -------------------------------------------------


@contextmanager
def _weights_seen(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collects the weights that linear layers and embeddings compute with, at each call."""
    seen: dict[str, list[Tensor]] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen.setdefault(name, []).append(module.get_parameter("weight").detach().clone())

        return hook

    handles = [
        module.register_forward_pre_hook(see(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def _seen_in_passes(case: Case, seed: int) -> list[tuple[State, dict[str, list[Tensor]], int]]:
    """Of each step the exact weights, those computed with, and bytes of the backward's gathers."""
    model, handle = installed(case, seed)
    found = []
    for step in range(STEPS):
        exact, sent = full_state(model), 0
        with _weights_seen(model) as seen:
            for micro in range(case.micro_batches):
                model.set_requires_gradient_sync(micro == case.micro_batches - 1)
                loss = model(*make_batch(model, 10 * step + micro))
                backward = partial(torch.autograd.backward, loss)
                sent += sent_while(handle, backward)["gather_sent_bytes"]
        descend(model.parameters(), rate=0.3)
        found.append((exact, seen, sent))
    return found


AGAIN = {
    "called again": Case(ranks=3, options={"again": True}, config={"weight_bits": 4}),
    "recomputed and called again": Case(
        options={"again": True, "checkpointing": True}, micro_batches=2, config={"weight_bits": 8}
    ),
    "called again, never resharded": Case(
        options={"again": True, "frozen": True}, reshard=False, config={"weight_bits": 4}
    ),
}


@pytest.mark.parametrize("name", AGAIN)
def test_each_call_of_a_block_sees_the_weights_of_the_step(run: Run, name: str) -> None:
    case, seed = _delta(AGAIN[name], delta_redraw_every=2), random.randrange(1 << 30)
    everyone = run(case.ranks, _seen_in_passes, case, seed)
    exact = [(step, state) for step, (state, _, _) in enumerate(everyone[0])]
    (expected,) = run(1, simulated, case, seed, exact)
    calls = case.micro_batches * (2 if case.options.get("checkpointing") else 1)
    for steps in everyone:
        for (_, seen, sent), weights in zip(steps, expected, strict=True):
            assert sent == 0
            for weight, values in seen.items():
                is_block = weight.startswith("blocks.")
                times = (1 + weight.startswith("blocks.0.")) * (
                    calls if is_block else case.micro_batches
                )
                assert len(values) == times
                assert all(torch.equal(value, weights[weight]) for value in values), weight
