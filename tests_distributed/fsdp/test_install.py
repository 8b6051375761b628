"""Removal restores FSDP2, and at full precision the wire is stock FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qsdp
from qsdp.compat.parameter_group import parameter_groups
from tests_distributed.support.helpers import full_grads, make_batch, make_model, shard
from tests_distributed.support.running import Run
from tests_distributed.support.training import assert_identical, train_plainly

CONFIG = {"bucket_size": 64}


def _train_removed(reshard: bool) -> tuple[Any, Any, bool]:
    stock = train_plainly(shard(make_model(1), reshard=reshard), 3)
    model = shard(make_model(1), reshard=reshard)
    groups = parameter_groups(model)
    before = [group.comms() for group in groups]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    handle = qsdp.install(model, qsdp.QSDPConfig(**CONFIG, grad_bits=2))
    torch.autograd.backward(model(*make_batch(model, 9)))
    model.zero_grad()
    with torch.no_grad():
        model(*make_batch(model, 9))  # leaves decoded weights gathered when not resharding
    handle.remove()
    after = [group.comms() for group in groups]
    pairs = [p for x, y in zip(before, after, strict=True) for p in zip(x, y, strict=True)]
    same = all(a is b for a, b in pairs)
    same &= hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    tensors = [t for group in groups for t in group.unsharded_parameters() if t is not None]
    same &= not any(getattr(t, "_post_accumulate_grad_hooks", None) for t in tensors)
    with pytest.raises(RuntimeError, match="removed already"):
        handle.remove()
    removed = train_plainly(model, 3)
    qsdp.install(model)  # and it may be installed anew
    return stock, removed, same


@pytest.mark.parametrize("reshard", [True, False])
def test_remove_restores_fsdp2_exactly(run: Run, reshard: bool) -> None:
    for stock, removed, same in run(2, _train_removed, reshard):
        assert same
        assert stock[0] == removed[0]
        assert_identical(removed[1], stock[1])


def _removed_within_a_step(gather: str) -> list[dict[str, Tensor]]:
    grads = []
    for is_installed in (False, True):
        model = shard(make_model(2))
        if is_installed:
            handle = qsdp.install(model, qsdp.QSDPConfig(weight_bits=32, gather=gather))
        loss = model(*make_batch(model, 3))
        if is_installed:
            handle.remove()
        torch.autograd.backward(loss)
        grads.append(full_grads(model))
    return grads


@pytest.mark.parametrize("gather", ["twice", "once"])
def test_a_backward_pass_after_remove_is_that_of_fsdp2(run: Run, gather: str) -> None:
    for stock, removed in run(2, _removed_within_a_step, gather):
        assert_identical(removed, stock)


def _full_precision(options: dict[str, Any]) -> tuple[Any, Any]:
    both = []
    for is_installed in (False, True):
        model = shard(make_model(2, **options))
        if is_installed:
            qsdp.install(model, qsdp.QSDPConfig(weight_bits=32, grad_bits=32))
        # One backward pass only: AdamW would blow a last bit up where a gradient is nearly zero.
        loss = model(*make_batch(model, 3))
        torch.autograd.backward(loss)
        both.append((float(loss.detach()), full_grads(model)))
    return both[0], both[1]


@pytest.mark.parametrize("options", [{}, {"tied": True, "frozen": True, "unused": True}])
def test_wire_32_is_stock_fsdp2_up_to_the_order_of_sums(run: Run, options: dict[str, Any]) -> None:
    for (stock_loss, stock), (loss, grads) in run(3, _full_precision, options):
        assert loss == stock_loss
        torch.testing.assert_close(grads, stock, rtol=1e-5, atol=1e-8)
