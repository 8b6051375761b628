"""CrAM's and SAM's second pass beside kept codes: its weights travel fresh, and leave no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import qsdp
from qsdp.methods.grad_norm import global_grad_norm
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import local_shard
from qsdp.sparsity.prunable import Prunable
from qsdp.sparsity.prune_and_round import prune_and_round_, prune_by_mask_
from tests_distributed.support.delta import bits_of, decoded, installed, same_on_all_ranks, wide
from tests_distributed.support.helpers import make_batch
from tests_distributed.support.running import Run, selection
from tests_distributed.support.training import exact_state

CONFIG: dict[str, Any] = {"weight_bits": 4, "grad_bits": 4, "delta_redraw_every": 4}
RHO, TARGET = 0.05, "0.5"
STEPS = 4


def _sgd(model: Any, rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, foreach=True)


def _pass(model: Any, handle: qsdp.Handle, sent: list[int], seed: int) -> Tensor:
    """Forward and backward; notes the bytes of its gathers."""
    before = handle.traffic.snapshot()["gather_sent_bytes"]
    loss: Tensor = model(*make_batch(model, seed))
    torch.autograd.backward(loss)
    sent.append(handle.traffic.snapshot()["gather_sent_bytes"] - before)
    return loss.detach()


# --- the same by hand ---------------------------------------------------------------------------


@torch.no_grad()
def _step_by_hand(
    method: str, model: Any, handle: qsdp.Handle, is_told: bool, run_pass: Callable[[], Tensor]
) -> Tensor:
    """CrAM+ or SAM written out, up to the gradient that is left."""
    parameters = list(model.parameters())
    with torch.enable_grad():
        loss = run_pass()
    scale = RHO if method == "CrAM" else RHO / (global_grad_norm(parameters) + 1e-12)
    grads = [p.grad for p in parameters]
    shards = [local_shard(p).values for p in parameters]
    before = [values.clone() for values in shards]
    for parameter, values in zip(parameters, shards, strict=True):
        values.add_(local_shard(parameter.grad).values, alpha=scale)
        parameter.grad = None
    with handle.aside():
        if method == "CrAM":
            prunable = Prunable.of(model)
            packed = prune_and_round_(prunable.shards(), Compression.of(TARGET), prunable.dims)
            masks = {p: m.unpack() for p, m in zip(prunable.parameters, packed, strict=True)}
            if is_told:
                handle.set_support(masks)
        with torch.enable_grad():
            run_pass()
        if method == "CrAM":
            for parameter, mask in masks.items():
                assert parameter.grad is not None
                prune_by_mask_(local_shard(parameter.grad).values, mask)
            if is_told:
                handle.set_support(None)
        for values, old in zip(shards, before, strict=True):
            values.copy_(old)
    if method == "CrAM":
        for parameter, grad in zip(parameters, grads, strict=True):
            local_shard(parameter.grad).values.add_(local_shard(grad).values)
    return loss


def _trained(method: str, by_hand: bool, is_told: bool, options: dict[str, Any]) -> list[Any]:
    """Losses, bytes of every pass, and weights, exact and decoded."""
    model, handle = installed(1, CONFIG, **options)
    base, sent, losses = _sgd(model), list[int](), []
    optimizer: Any = None
    if not by_hand:
        if method == "CrAM":
            optimizer = qsdp.CrAM(model, base, sparsity=TARGET, rho=RHO)
        else:
            optimizer = qsdp.SAM(model, base, rho=RHO)
        if is_told:
            optimizer.share_support(handle.set_support)
    for step in range(STEPS):
        run_pass = partial(_pass, model, handle, sent, step)
        if by_hand:
            losses.append(float(_step_by_hand(method, model, handle, is_told, run_pass)))
            base.step()
            base.zero_grad()
        else:
            losses.append(float(optimizer.step(run_pass)))
    weights = decoded(model)
    same = same_on_all_ranks(weights)
    return [losses, sent, bits_of(exact_state(model)), bits_of(weights), same]


def _as_by_hand(method: str, is_told: bool) -> list[str]:
    """In what the steps of an optimizer differ from those written out."""
    options = {"unused": False, "num_layers": 1}
    found, expected = (_trained(method, by_hand, is_told, options) for by_hand in (False, True))
    names = ("losses", "bytes", "weights", "decoded weights", "same")
    differing = [n for n, a, b in zip(names, found, expected, strict=True) if a != b]
    assert all(map(math.isfinite, found[0]))
    assert found[-1]
    return differing


@selection(
    ("ranks", "method", "is_told"),
    [(3, "CrAM", True), (2, "SAM", False)],
    (2, 3),
    ("CrAM", "SAM"),
    (False, True),
)
def test_a_second_pass_is_one_that_is_taken_inside_an_aside(
    run: Run, ranks: int, method: str, is_told: bool
) -> None:
    assert run(ranks, _as_by_hand, method, is_told) == [[]] * ranks


# --- its bytes ----------------------------------------------------------------------------------


def _bytes_of_passes(method: str) -> tuple[list[int], list[int], int]:
    """Bytes of first and of second passes, and of a gather of everything."""
    config = {"weight_bits": 4, "embedding_bits": 4, "grad_bits": 8}
    model, handle = wide(2, config)
    base = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if method == "AdamW":
        optimizer: Any = base
    elif method == "SAM":
        optimizer = qsdp.SAM(model, base, rho=RHO)
    else:
        optimizer = qsdp.CrAM(model, base, sparsity=("0.5", "0.8"), rho=RHO)
    sent = list[int]()
    for step in range(8):
        if method == "AdamW":
            optimizer.zero_grad()
            _pass(model, handle, sent, step)
            optimizer.step()
        else:
            optimizer.step(partial(_pass, model, handle, sent, step))
    assert same_on_all_ranks(decoded(model))
    passes = 1 if method == "AdamW" else 2
    return sent[::passes], sent[1::2] if passes == 2 else [], dist.get_world_size()


@selection("method", [("CrAM",)], ("CrAM", "SAM"))
def test_a_first_pass_sends_as_little_as_without_a_second_one(run: Run, method: str) -> None:
    plain = run(2, _bytes_of_passes, "AdamW")
    for (first, second, _), (alone, *_) in zip(
        run(2, _bytes_of_passes, method), plain, strict=True
    ):
        assert first[0] == alone[0]  # all is drawn
        assert max(second) < 1.1 * first[0]
        assert max(first[-3:]) < min(second) / 3
        assert max(first[-3:]) < 1.5 * max(alone[-3:])
