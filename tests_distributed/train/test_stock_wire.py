"""The bytes stated of stock FSDP2 are those of the collectives that it calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from qsdp.sparsity.compression_target import Compression
from qsdp.train import validate
from qsdp.train.config import TrainConfig
from qsdp.train.loop import train_step
from qsdp.train.setup import set_up
from qsdp.train.wire_bytes import threshold_bytes
from qsdp.train.world import World
from tests_distributed.support.launching import TEXT
from tests_distributed.support.running import Run


class Counter:
    """Bytes that FSDP2's own collectives sent from this rank; gloo reduces by an all-reduce."""

    def __init__(self) -> None:
        self.sent = 0

    def during(self, work: Callable[[], object]) -> int:
        before = self.sent
        work()
        return self.sent - before


class CountingGather(DefaultAllGather):
    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def __call__(self, *, input_tensor: Tensor, **others: Any) -> Any:  # type: ignore[override]
        peers = dist.get_world_size() - 1
        self.counter.sent += peers * input_tensor.numel() * input_tensor.element_size()
        return super().__call__(input_tensor=input_tensor, **others)


class CountingReduce(DefaultReduceScatter):
    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def __call__(self, *, output_tensor: Tensor, **others: Any) -> Any:  # type: ignore[override]
        peers = dist.get_world_size() - 1
        self.counter.sent += 2 * peers * output_tensor.numel() * output_tensor.element_size()
        return super().__call__(output_tensor=output_tensor, **others)


def compare(folder: Path, options: dict[str, Any]) -> None:
    with ExitStack() as held:
        compare_steps(folder, options, held)


def compare_steps(folder: Path, options: dict[str, Any], held: ExitStack) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, torch.device("cpu"), "gloo", init_device_mesh("cpu", (size,)))
    config = TrainConfig.of(
        data=str(folder / "text.txt"),
        out=str(folder / "out"),
        **{"model": "tiny", "steps": 9, "seq_len": 16, "batch_size": 2, "eval_batches": 3}
        | options,
    )
    job = set_up(config, world, held)
    assert job is not None
    counter = Counter()
    for module in job.model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(CountingGather(counter))
            module.set_custom_reduce_scatter(CountingReduce(counter))

    def step() -> None:
        before = job.wire.total()
        counted = counter.during(lambda: train_step(job))
        assert (job.wire.total() - before).sent_bytes == counted > 0

    def evaluate(work: Callable[[], object], num_thresholds: int = 0) -> int:
        before = job.wire.total()
        counted = counter.during(work)
        spent = job.wire.total() - before
        assert (spent.sent_bytes, spent.fp32_bytes) == (0, 0)
        assert (
            spent.other_bytes - num_thresholds * threshold_bytes(Compression(sparsity=0.5), 1, size)
            == counted
            > 0
        )
        return counted

    step()
    once = evaluate(lambda: job.evaluator.loss())
    step()
    evaluate(lambda: job.evaluator.one_shot(), num_thresholds=4)
    # Nothing is gathered again from token to token.
    with mock.patch.object(validate, "_SAMPLE_TOKENS", 10):
        assert evaluate(lambda: job.evaluator.sample()) < once
    step()


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, {"grad_accum": 2}), (3, {"precision": "bf16"}), (2, {"cram": True})],
    ids=["accumulation", "bf16", "cram"],
)
def test_bytes_of_stock_fsdp2_are_those_of_its_collectives(
    run: Run, tmp_path: Path, world_size: int, options: dict[str, Any]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run(world_size, compare, tmp_path, options)
