"""Promises of the worker pools and of the toy model that the other tests stand on."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.support import patience
from tests_distributed.support import leftovers
from tests_distributed.support.helpers import full_grads, full_state, make_batch, make_model, shard
from tests_distributed.support.pool import GLOO_TIMEOUT_S, RankError
from tests_distributed.support.running import Run, selection


def _sum_over_ranks(values: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    total = values * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), total


def _fail_on_rank(failing: int) -> None:
    if dist.get_rank() == failing:
        time.sleep(0.2)
        raise LookupError(f"the message of rank {failing}")
    dist.barrier()


def _fail_one_after_the_other() -> None:
    time.sleep(0.3 * (dist.get_world_size() - dist.get_rank()))
    raise LookupError(f"the message of rank {dist.get_rank()}")


def _sleep_on_rank(sleeping: int) -> None:
    if dist.get_rank() == sleeping:
        time.sleep(1000)


def _die_on_rank(dying: int) -> None:
    if dist.get_rank() == dying:
        os._exit(7)
    dist.barrier()


_kept: list[Any] = []


def _leave(what: str) -> None:
    leftovers._ENDING_S = 0.1  # of a worker that ends with this call
    if what == "files":
        _kept.append(os.fdopen(os.open(__file__, os.O_RDONLY)))
    if what == "threads":
        for _ in range(2):
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    if what == "gloo_tcp_loop":
        _kept.extend(dist.new_group() for _ in range(2))


def _two_axes() -> float:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("a", "b"))
    model = shard(make_model(), mesh=mesh["b"])
    replicated = torch.ones(1) * mesh["a"].get_local_rank()
    dist.all_reduce(replicated, group=mesh["a"].get_group())
    total = sum(float(value.double().sum()) for value in full_state(model).values())
    return total * float(replicated)


def _gradients(options: dict[str, Any], reshard: bool) -> tuple[Any, Any, list[int]]:
    model = shard(make_model(seed=3, **options), reshard=reshard)
    loss = model(*make_batch(model, seed=5))
    torch.autograd.backward(loss)
    shards = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    return full_state(model), full_grads(model), shards


TOY_OPTIONS = ["plain", "tied", "frozen", "unused", "checkpointing"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_answers_in_order_from_the_same_processes(run: Run, world_size: int) -> None:
    values = torch.randn(5)
    first = run(world_size, _sum_over_ranks, values)
    again = run(world_size, _sum_over_ranks, values)
    assert [rank for rank, _, _ in first] == list(range(world_size))
    assert [pid for _, pid, _ in first] == [pid for _, pid, _ in again]
    expected = values * (world_size * (world_size + 1) // 2)
    for _, _, total in first + again:
        torch.testing.assert_close(total, expected)


def test_a_failing_ranks_traceback_reaches_the_parent_and_the_next_call_works(run: Run) -> None:
    before = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 3 failed(.|\n)*the message of rank 1") as info:
        run(3, _fail_on_rank, 1)
    assert "in _fail_on_rank" in str(info.value)
    assert time.monotonic() - before < GLOO_TIMEOUT_S / 2
    assert len(run(3, _sum_over_ranks, torch.ones(1))) == 3


def test_the_first_failure_in_time_is_the_one_reported(run: Run) -> None:
    with pytest.raises(RankError, match="the message of rank 2"):
        run(3, _fail_one_after_the_other)


def test_a_hang_is_cut_and_shows_where(run: Run) -> None:
    run(2, _sum_over_ranks, torch.ones(1))  # so that the ranks are there
    with pytest.raises(RankError, match=r"ranks 0, 1 of 2 did not answer in \d+ s") as info:
        run(2, _sleep_on_rank, 1, timeout=patience.seconds(2))
    assert "in _sleep_on_rank" in str(info.value)
    assert len(run(2, _sum_over_ranks, torch.ones(1))) == 2


def test_a_worker_that_dies_is_reported(run: Run) -> None:
    with pytest.raises(RankError, match=r"rank 0 of 2 failed(.|\n)*exit code 7"):
        run(2, _die_on_rank, 0)
    assert len(run(2, _sum_over_ranks, torch.ones(1))) == 2


@pytest.mark.parametrize("what", ["files", "threads", "gloo_tcp_loop"])
def test_a_call_that_leaves_something_behind_has_failed(run: Run, what: str) -> None:
    with pytest.raises(RankError, match=rf"_leave at .* left behind: .*{what}") as info:
        run(2, _leave, what)
    assert what != "files" or "test_pool.py" in str(info.value)
    assert len(run(2, _sum_over_ranks, torch.ones(1))) == 2


def test_what_workers_cannot_import_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        run(2, lambda: None)
    with pytest.raises(ValueError, match="world_size is 5"):
        run(5, _two_axes)


def test_meshes_of_one_call_do_not_reach_the_next(run: Run) -> None:
    results = [run(4, _two_axes) for _ in range(2)]
    assert len(set(results[0] + results[1])) == 1


@selection(
    "world_size, reshard, option",
    [
        *((2, True, option) for option in TOY_OPTIONS),
        *((3, False, option) for option in TOY_OPTIONS),
        (4, True, "plain"),
        (4, False, "unused"),
    ],
    [2, 3, 4],
    [True, False],
    TOY_OPTIONS,
)
def test_the_sharded_toy_has_the_gradients_of_the_plain_one(
    run: Run, world_size: int, reshard: bool, option: str
) -> None:
    options = {} if option == "plain" else {option: True}
    model = make_model(seed=3, **options)
    losses = [model(*make_batch(model, seed=5, rank=rank)) for rank in range(world_size)]
    torch.autograd.backward(torch.stack(losses).mean())
    num_empty = 0
    for state, grads, shards in run(world_size, _gradients, options, reshard):
        torch.testing.assert_close(state, full_state(model), rtol=0, atol=0)
        torch.testing.assert_close(grads, full_grads(model))
        num_empty += shards.count(0)
    assert num_empty > 0
