"""Bits for each parameter, allotted so that the squared error is least within a budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from qsdp.codec.payload import Segment
from qsdp.common.dtypes import DType
from qsdp.common.wire_values import bits_of_both
from qsdp.config import CODED_BITS, QSDPConfig


class Claim(NamedTuple):
    """What a bit budget knows of one parameter's coded weights, or gradients."""

    numel: int
    """Values of the whole parameter."""
    padded: int
    """Values that each rank's payload has room for."""
    num_ranks: int
    """Payloads that bring the whole parameter."""
    kept_bits: int | None
    """Bits that no budget changes; None: to be allotted."""


def check_budget(weights: Sequence[Claim], grads: Sequence[Claim], config: QSDPConfig) -> None:
    """Raise ValueError if there is a bit budget and nothing to allot, or too little for 2 bits."""
    given = config.budget_of(is_grad=True)
    if given is None:
        return
    if all(claim.kept_bits is not None for claim in (*weights, *grads)):
        which = "grad_bits" if config.budget is None else "weight_bits or grad_bits"
        raise ValueError(
            f"the budget is {given:g} bits a value, but there is nothing to allot: give "
            f"{which} of 2 to 8 to some parameter that neither policy nor embedding_bits is for, "
            "or leave the budget out."
        )
    for claims, is_grad in ((weights, False), (grads, True)):
        budget = config.budget_of(is_grad=is_grad)
        if budget is not None:
            _left(claims, budget, config, is_grad)


def budget_request(config: QSDPConfig) -> dict[str, Any]:
    """All of the config that allotted bits depend on, except roundings, in JSON's types."""
    names = ["budget", "weight_bits", "grad_bits", "embedding_bits", "bucket_size"]
    # Where these are unset, as states were without them.
    later = ("weight_bucket_size", "grad_budget")
    names += [name for name in later if getattr(config, name) is not None]
    names += ["grad_rotation"] if config.grad_rotation != "none" else []
    policy = [[pattern, *bits_of_both(bits)] for pattern, bits in config.policy]
    return {name: getattr(config, name) for name in names} | {"policy": policy}


def allot(
    claims: Sequence[Claim],
    errors: Sequence[Sequence[float]],
    budget: float,
    config: QSDPConfig,
    *,
    is_grad: bool,
) -> list[int]:
    """Allot a bit budget: bits for each parameter so that the squared error is least within it.

    That error is a sum over parameters. From 2 bits each, the parameter whose error falls most for
    a bit of payload gets one bit more, as long as all payloads, padding and bucket metadata
    included, stay within ``budget`` bits a value.

    Args:
        claims: Those of all parameters that are coded.
        errors: ``errors[i][b]`` is the squared error at CODED_BITS[b] of parameter i, counted among
            those that keep no bits.
        budget: Bits a value on average.
        is_grad: Whether the values are the parameters' gradients.

    Returns:
        The bits of those that keep none.

    Raises:
        ValueError: Not even 2 bits fit.
    """
    left = _left(claims, budget, config, is_grad)
    claims = [claim for claim in claims if claim.kept_bits is None]
    sizes = [[_size(claim, b, config, is_grad) for b in CODED_BITS] for claim in claims]
    places = [0] * len(claims)
    queue: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        """Queue the next bit of a parameter, the best gain first, then the first parameter."""
        place = places[i]
        if place + 1 < len(CODED_BITS):
            saved = errors[i][place] - errors[i][place + 1]
            gain = saved / max(sizes[i][place + 1] - sizes[i][place], 1)
            if gain > 0:
                heapq.heappush(queue, (-gain, i))

    for i in range(len(claims)):
        offer(i)
    while queue:
        _, i = heapq.heappop(queue)
        cost = sizes[i][places[i] + 1] - sizes[i][places[i]]
        assert cost >= 0
        # What does not fit now never will: nothing gives back what is left.
        if cost <= left:
            left -= cost
            places[i] += 1
            offer(i)
    return [CODED_BITS[place] for place in places]


def _left(claims: Sequence[Claim], budget: float, config: QSDPConfig, is_grad: bool) -> float:
    """Bits of the budget that are left once every parameter has the bits that it keeps, or 2."""
    least = sum(_size(c, c.kept_bits or CODED_BITS[0], config, is_grad) for c in claims)
    numel = sum(claim.numel for claim in claims)
    if least > budget * numel:
        raise ValueError(
            f"the budget is {budget:g} bits a value, but {'gradients' if is_grad else 'weights'} "
            f"take {math.ceil(100 * least / numel) / 100:g} with the bits that policy and "
            "embedding_bits give, 2 bits for the others, padding and buckets' metadata: raise the "
            "budget or the bucket size, or give fewer bits."
        )
    return budget * numel - least


def _size(claim: Claim, bits: int, config: QSDPConfig, is_grad: bool) -> int:
    """Bits in all ranks' payloads."""
    segment = Segment(
        bits=bits,
        dtype=DType.FP32,
        padded=claim.padded,
        parameter=0,
        bucket=config.bucket_of(bits, is_grad=is_grad),
    )
    return (
        8 * claim.num_ranks * (segment.data_bytes(claim.padded) + segment.meta_bytes(claim.padded))
    )
