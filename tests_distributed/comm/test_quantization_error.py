"""The errors that are measured: by parameter, alike on all ranks, and of the bits that travel."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

import qsdp
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.running import Run
from tests_distributed.support.training import train


def _errors() -> Any:
    model = shard(make_model())
    handle = qsdp.install(model, qsdp.QSDPConfig(weight_bits=4, grad_bits=6, bucket_size=64))
    before = handle.errors()
    with handle.measuring():
        model(*make_batch(model, 1)).backward()
    return before, handle.errors(), handle.times.snapshot()


def test_errors_are_reported_by_parameter_and_alike_on_all_ranks(run: Run) -> None:
    results = run(3, _errors)
    for before, errors, times in results:
        assert before == results[0][0]
        assert errors == results[0][1]
        assert before["blocks.0.qkv.weight"]["grad"] is None
        weight, grad = errors["blocks.0.qkv.weight"].values()
        assert 0.03 < weight < 0.2  # 15 steps over a bucket's range: MSE d^2/12
        assert 0.003 < grad < 0.1
        assert errors["norm.weight"] == {"weight": None, "grad": None}
        assert all(seconds > 0 for seconds in times.values())
        assert len(times) == 6


def _measured_twice_over() -> list[float | None]:
    """A gradient's error inside a ``measuring``, and after ones of all kinds.

    After an inner one, after the outer one, after two that an exception ended, after a pass that is
    not measured, and after one without a pass.
    """
    model = shard(make_model())
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=64, rounding="nearest"))

    def take(bits: int) -> None:
        for plan in handle._plans:
            plan.set_bits({p.name: (8, bits) for p in plan.parameters if p.grad_bits <= 8})
        model(*make_batch(model, 1)).backward()

    def error() -> float | None:
        return handle.errors()["blocks.0.qkv.weight"]["grad"]

    found = []
    with handle.measuring():
        take(8)
        found.append(error())
        with handle.measuring():
            take(3)
        found.append(error())
        take(8)
    found.append(error())
    with suppress(LookupError), handle.measuring(), handle.measuring():
        take(3)
        raise LookupError
    found.append(error())
    take(8)
    found.append(error())
    assert not handle._wire.meters
    with handle.measuring():
        pass
    return [*found, error()]


def test_one_measuring_inside_another_leaves_both_whole(run: Run) -> None:
    eight, three, both, cut_short, later, nothing = run(2, _measured_twice_over)[0]
    # The outer one saw the same gradient three times, twice at 8 bits and once at 3.
    assert both**2 == pytest.approx((2 * eight**2 + three**2) / 3)
    assert three > 10 * eight
    assert cut_short == later == three
    assert nothing is None


def _errors_around_a_warm_up(warmup_bits: int) -> list[dict[str, dict[str, float | None]]]:
    model = shard(make_model(frozen=True))
    config = qsdp.QSDPConfig(
        weight_bits=3, bucket_size=64, warmup_steps=1, warmup_bits=warmup_bits, gather="once"
    )
    handle = qsdp.install(model, config)
    found = [handle.errors()]
    train(model, steps=1)
    return [*found, handle.errors()]


def test_weights_have_the_errors_of_the_warm_up_while_it_lasts(run: Run) -> None:
    for warmup_bits in (32, 8):
        for during, after in run(2, _errors_around_a_warm_up, warmup_bits):
            warm, cold = (each["blocks.0.qkv.weight"]["weight"] for each in (during, after))
            assert warm is None if warmup_bits == 32 else 0 < warm < 0.01
            assert cold > 0.05
            # Frozen weights are gathered once, as after the warm-up.
            frozen = during["blocks.0.out.weight"]["weight"]
            assert frozen == after["blocks.0.out.weight"]["weight"] > 0.05
