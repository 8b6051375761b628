"""Bits allotted to a budget: those of the plainest way to do it, without its rescans."""

from __future__ import annotations

import dataclasses
import random
from unittest import mock

import pytest

from qsdp.comm import bit_budget
from qsdp.comm.bit_budget import Claim, allot, budget_request
from qsdp.config import CODED_BITS, QSDPConfig


def _size(claim: Claim, bits: int, config: QSDPConfig, is_grad: bool) -> int:
    """Bits of all ranks' codes and of their buckets' metadata, 8 bytes each."""
    codes = -(-claim.padded * bits // 8)
    buckets = -(-claim.padded // config.bucket_of(bits, is_grad=is_grad))
    return 8 * claim.num_ranks * (codes + 8 * buckets)


def _allotted_plainly(
    claims: list[Claim], errors: list[list[float]], config: QSDPConfig, is_grad: bool
) -> list[int]:
    """Bit by bit, each to the first of those who gain most by it among all who can have one."""
    assert config.budget is not None
    left = config.budget * sum(claim.numel for claim in claims)
    left -= sum(_size(c, c.kept_bits or CODED_BITS[0], config, is_grad) for c in claims)
    claims = [claim for claim in claims if claim.kept_bits is None]
    bits = [CODED_BITS[0]] * len(claims)
    while True:
        offers = []
        for i, (claim, own) in enumerate(zip(claims, bits, strict=True)):
            if own < CODED_BITS[-1]:
                cost = _size(claim, own + 1, config, is_grad) - _size(claim, own, config, is_grad)
                place = CODED_BITS.index(own)
                gain = (errors[i][place] - errors[i][place + 1]) / max(cost, 1)
                if cost <= left and gain > 0:
                    offers.append((-gain, i, cost))
        if not offers:
            return bits
        _, i, cost = min(offers)
        left -= cost
        bits[i] += 1


def _claims(draw: random.Random, num: int) -> list[Claim]:
    sizes = [draw.choice((1, 7, 128, 129, 257, 1024, 1025, 5000)) for _ in range(3)]
    ranks = draw.randint(1, 4)
    claims = []
    for _ in range(num):
        padded = draw.choice(sizes) if draw.random() < 0.7 else draw.randint(1, 3000)
        kept = draw.choice(CODED_BITS) if draw.random() < 0.1 else None
        claims.append(Claim(padded * ranks - draw.randrange(ranks), padded, ranks, kept))
    return claims


def _errors(draw: random.Random) -> list[float]:
    """Errors that fall by a factor of four, or by whole numbers.

    There are many ties, a bit that gains nothing or loses, and one that gains more than the bit
    before it.
    """
    if draw.random() < 0.3:
        return [float(draw.randrange(4)) for _ in CODED_BITS]
    scale = draw.choice((1.0, 64.0, draw.random()))
    return [scale / 4.0**bits for bits in CODED_BITS]


def test_bits_are_allotted_anew_for_other_buckets_of_weights_and_asked_for_as_ever() -> None:
    config = QSDPConfig(budget=4.0, policy=(("a.*", 8),))
    asked = budget_request(config)
    assert asked == {
        "budget": 4.0,
        "weight_bits": 8,
        "grad_bits": 8,
        "embedding_bits": None,
        "bucket_size": None,
        "policy": [["a.*", 8, 8]],
    }
    other = budget_request(dataclasses.replace(config, weight_bucket_size=64))
    assert other == asked | {"weight_bucket_size": 64}
    other = budget_request(dataclasses.replace(config, budget=None, grad_budget=4.0))
    assert other == asked | {"budget": None, "grad_budget": 4.0}
    other = budget_request(dataclasses.replace(config, grad_rotation="hadamard"))
    assert other == asked | {"grad_rotation": "hadamard"}


@pytest.mark.parametrize("is_grad", [False, True])
@pytest.mark.parametrize("bucket_size", [None, 64])
def test_bits_are_those_of_asking_every_parameter_for_every_bit(
    bucket_size: int | None, is_grad: bool
) -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    seen = set()
    for _ in range(300):
        claims = _claims(draw, draw.randint(1, 20))
        errors = [_errors(draw) for claim in claims if claim.kept_bits is None]
        budget = draw.uniform(2.01, 9)
        config = QSDPConfig(budget=budget, bucket_size=bucket_size)
        try:
            found = allot(claims, errors, budget, config, is_grad=is_grad)
        except ValueError:  # not even 2 bits fit
            continue
        assert found == _allotted_plainly(claims, errors, config, is_grad), f"seed {seed}"
        seen.update(found)
    assert seen == set(CODED_BITS)


def test_a_thousand_matrices_are_sized_a_few_times_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked anew for every bit of every other, a thousand would be sized millions of times."""
    counts = {}
    sizing = mock.Mock(wraps=bit_budget.Segment)
    monkeypatch.setattr(bit_budget, "Segment", sizing)
    config = QSDPConfig(budget=5.0)
    for num in (250, 1000):
        draw = random.Random(num)
        sizing.reset_mock()
        claims = [Claim(4096, 2048, 2, None)] * num
        errors = [[draw.random() / 4.0**bits for bits in CODED_BITS] for _ in claims]
        bits = allot(claims, errors, 5.0, config, is_grad=False)
        assert len(set(bits)) > 1
        counts[num] = sizing.call_count
    assert counts[1000] == 4 * counts[250]
    assert 0 < counts[1000] <= 10 * 1000
