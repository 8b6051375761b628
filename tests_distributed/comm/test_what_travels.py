"""What the wire measures, learns and says is of the values that travel.

It is so under masks, in a warm-up, for payloads that are kept, and where nothing is quantized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import qsdp
from qsdp.codec.level_fitting import BINS, fit_levels, level_histogram, uniform_levels
from qsdp.comm.bit_budget import Claim, allot
from qsdp.config import CODED_BITS
from qsdp.sparsity.local_shards import local_shard
from tests.support.codec_wire import send
from tests_distributed.support.helpers import Toy, full_state, make_batch
from tests_distributed.support.running import Run
from tests_distributed.support.trainings import Case, installed

BUCKET = 64  # of ``trainings``


def _train(model: Toy, steps: int) -> None:
    for step in range(steps):
        model(*make_batch(model, step)).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.1)
                p.grad = None


@contextmanager
def _gathered(model: Toy) -> Iterator[dict[str, Tensor]]:
    """Inside, the weights as gathers bring them."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.unshard()
    yield {name: p.detach().clone() for name, p in model.named_parameters()}
    for module in modules:
        module.reshard()


def _errors(case: Case, steps: int, is_exact: bool) -> Any:
    """What is said of all weights, and what a gather then does to them.

    Codes that are rounded to the nearest are the same under every key.
    """
    model, handle = installed(case, 5)
    _train(model, steps)
    exact = full_state(model)
    with handle.exact() if is_exact else nullcontext():
        said = {name: error["weight"] for name, error in handle.errors().items()}
        with _gathered(model) as found:
            pass
    done = {
        name: float((found[name] - value).double().norm() / value.double().norm().clamp(1e-30))
        for name, value in ((name, value.to(case.dtypes[0])) for name, value in exact.items())
    }
    return said, done


NEAREST: dict[str, Any] = {"rounding": "nearest", "weight_bits": 4, "grad_bits": 4}
EIGHT: dict[str, Any] = {**NEAREST, "weight_bits": 8}
ONCE: dict[str, Any] = {**NEAREST, "gather": "once"}
LEARNED: dict[str, Any] = {"levels": "learned", "level_steps": (1,)}
DELTA: dict[str, Any] = {"weight_bits": 4, "gather": "delta", "delta_redraw_every": 2}


@pytest.mark.parametrize(
    ("case", "steps", "is_exact"),
    [
        (Case(ranks=3, sparse=True, config={**NEAREST, **LEARNED}), 2, False),
        (Case(sparse=True, options={"frozen": True}, config={**ONCE, **LEARNED}), 2, False),
        (Case(sparse=True, config={**NEAREST, "warmup_steps": 1, "warmup_bits": 6}), 0, False),
        (Case(sparse=True, config=NEAREST), 1, True),
        (Case(ranks=1, config=NEAREST), 1, False),
        (Case(config={**NEAREST, **LEARNED}), 1, False),
        (Case(config={**NEAREST, **LEARNED, "budget": 5.5}), 1, False),
        (Case(dtypes=(torch.bfloat16, torch.bfloat16), config=EIGHT), 1, False),
        (Case(ranks=3, options={"frozen": True}, config=DELTA), 3, False),
        (Case(ranks=3, sparse=True, config=DELTA), 2, False),
        (Case(config={**NEAREST, **DELTA, "warmup_steps": 4, "warmup_bits": 6}), 2, False),
        (Case(config={**DELTA, "budget": 5.5}), 1, False),
    ],
    ids=[
        *("masks", "masks-gathered-once", "masks-in-a-warm-up", "exact", "one-rank"),
        *("levels-due", "budget-due", "bf16", "changes", "changes-under-masks"),
        *("changes-in-a-warm-up", "changes-with-a-budget-due"),
    ],
)
def test_the_errors_said_are_those_of_the_weights_that_a_gather_brings(
    run: Run, case: Case, steps: int, is_exact: bool
) -> None:
    for said, done in run(case.ranks, _errors, case, steps, is_exact):
        for name, error in said.items():
            assert done[name] == pytest.approx(error or 0.0, rel=1e-4), name
        is_coded = not is_exact and case.ranks > 1
        assert (said["blocks.0.qkv.weight"] is not None) == is_coded


def _measured_along_the_way(asks: bool) -> Any:
    """A training with a budget and learned levels, asked for errors at every point of a step.

    Returns all that it depends on, the errors of its gradients, and what is due at each point.
    """
    config: dict[str, Any] = {"budget": 5.5, "levels": "learned", "level_steps": (1, 2)}
    model, handle = installed(Case(ranks=2, config=config), 9)
    found: list[Any] = []
    due = []

    def ask() -> None:
        if asks:
            due.append(handle._adaptation.due)
            before = handle._wire.levels and handle._wire.levels.state()
            with torch.inference_mode(len(due) % 2 == 0):
                handle.errors()
            assert handle._wire.levels
            assert handle._wire.levels.state() == before

    for step in range(4):
        with handle.measuring():
            ask()
            loss = model(*make_batch(model, step))
            ask()
            loss.backward()
            ask()
        found.append((float(loss), {n: e["grad"] for n, e in handle.errors().items()}))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.1)
                p.grad = None
        ask()
        if step == 2:
            found.append(json.dumps(handle.state_dict()))
    weights = {name: value.tolist() for name, value in full_state(model).items()}
    return [*found, json.dumps(handle.state_dict()), weights], due


def test_a_training_is_the_same_where_errors_are_asked_for(run: Run) -> None:
    for (expected, _), (found, due) in zip(
        run(2, _measured_along_the_way, False), run(2, _measured_along_the_way, True), strict=True
    ):
        assert {*due} == {"", "bits and levels", "levels"}
        assert found == expected


def _sent_of(model: Toy, masks: bool) -> dict[str, Tensor]:
    """What this rank's gathers carry of each matrix of the blocks, of weights alone: 1-D."""
    found = {}
    for name, parameter in model.named_parameters():
        values = local_shard(parameter).values.detach().reshape(-1)
        if "blocks" in name and parameter.ndim == 2:
            found[name] = values[values != 0] if masks else values
    return found


def _learned() -> Any:
    """Before levels are learned: the counts of what travels; then the levels."""
    model, handle = installed(Case(sparse=True, config={"weight_bits": 3, **LEARNED}), 6)
    _train(model, 1)
    counts = {}
    for name, values in _sent_of(model, masks=True).items():
        counts[name] = torch.zeros(BINS, dtype=torch.int64)
        level_histogram(values, BUCKET, counts[name])
    before = handle.traffic.snapshot()["other_sent_bytes"]
    levels = {
        (name, kind, bits): values for name, kind, bits, *values in handle.state_dict()["levels"]
    }
    return counts, levels, handle.traffic.snapshot()["other_sent_bytes"] - before


def test_kept_weights_have_levels_of_their_own_and_what_learning_sends_is_counted(
    run: Run,
) -> None:
    (first, levels, sent), (second, same, sent_too) = run(2, _learned)
    assert levels == same
    expected = {
        (name, "kept", 3): fit_levels(uniform_levels(3), counts + second[name]).tolist()
        for name, counts in first.items()
        if (counts + second[name]).any()  # nothing is kept of one
    }
    assert levels == expected
    assert len(levels) == len(first) - 1
    assert uniform_levels(3).tolist() not in levels.values()
    # An all-reduce of int64 bins, of whole weights too, over two ranks.
    assert sent == sent_too == 8 * BINS * 2 * len(first)


def _allotted() -> Any:
    """Errors of what travels at all bits, and the claims, before bits are allotted; then bits."""
    policy = (("embed.*", 16), ("position.*", 16), ("head.*", 16))
    config = qsdp.QSDPConfig(
        bucket_size=BUCKET, budget=5.5, rounding="nearest", grad_bits=16, policy=policy
    )
    case = Case(sparse=True, config={"budget": 5.5, "rounding": "nearest", "grad_bits": 16})
    case.config["policy"] = policy
    model, handle = installed(case, 7)
    _train(model, 1)
    errors = {
        name: [
            float((send(x, b, "nearest", bucket=BUCKET).values - x).double().square().sum())
            for b in CODED_BITS
        ]
        for name, x in _sent_of(model, masks=True).items()
    }
    handle.state_dict()
    rows = {row.name: row for row in handle.report().rows}
    shapes = {name: rows[name].shape for name in errors}
    claims = [Claim(a * b, -(-a // 2) * b, 2, None) for a, b in shapes.values()]
    return errors, claims, config, {name: int(rows[name].weight.split()[0]) for name in errors}


def test_a_budget_is_allotted_by_the_errors_of_kept_weights(run: Run) -> None:
    (first, claims, config, bits), (second, *_) = run(2, _allotted)
    errors = [[a + b for a, b in zip(first[name], second[name], strict=True)] for name in first]
    assert list(bits.values()) == allot(claims, errors, 5.5, config, is_grad=False)
    assert len(set(bits.values())) > 2


def _remarks(gather: str) -> list[list[str]]:
    model, handle = installed(Case(config={"gather": gather}, options={"frozen": True}), 8)
    weights = [block.get_parameter("out.weight") for block in model.blocks]
    found = [[*handle.report().remarks]]
    masks = {}
    with torch.no_grad():
        for weight in weights:
            local = local_shard(weight).values
            mask = masks[weight] = torch.zeros_like(local, dtype=torch.bool)
            mask[:, ::5] = True
            local.mul_(mask)
    for with_grads in (True, False):
        handle.set_support(cast(Any, masks), with_grads=with_grads)
        found.append([*handle.report().remarks])
    with pytest.raises(ValueError, match="with_grads is False without masks"):
        handle.set_support(None, with_grads=False)
    handle.set_support(None)
    found.append([*handle.report().remarks])
    return found


@pytest.mark.parametrize(("gather", "num"), [("twice", 2), ("once", 1)])
def test_the_report_tells_of_masks_and_of_what_is_sent_once(
    run: Run, gather: str, num: int
) -> None:
    """The first of two masked weights is frozen: with gather="once" it is sent whole."""
    for before, both, weights, lifted in run(2, _remarks, gather):
        assert before == lifted
        frozen = "gather once: 3 frozen parameters are sent once for all steps, whole, on the "
        frozen += "uniform grid, without a warm-up"
        assert (frozen in before) == (gather == "once")
        masks = f"masks: of {num} parameters only the kept 20.0% of the weights travel"
        assert {*both} - {*before} == {f"{masks}, and of the gradients"}
        assert {*weights} - {*before} == {f"{masks}, and all gradients"}
