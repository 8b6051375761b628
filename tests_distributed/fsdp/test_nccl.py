"""The hooks over NCCL: the numbers of CPUs, whatever the streams do.

NCCL takes one rank a GPU of a host. Where GPUs are too few, ranks share them and each says that it
is a host of its own: payloads then go through sockets, and what qsdp sees of NCCL is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.compat.process_groups import backend_of
from tests_distributed.support import alike, leftovers
from tests_distributed.support.alike import CASES, MORE_CASES, RACES, Case, assert_equal
from tests_distributed.support.apart import APART, train_apart
from tests_distributed.support.pool import meet, meets_by_itself
from tests_distributed.support.running import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and dist.is_nccl_available()), reason="no GPU, or no NCCL"
    ),
]

# A group made without a backend has gloo for the CPU; one of NCCL alone has control messages on
# the GPU too.
BACKENDS = [None, "nccl"]


@meets_by_itself
def over_nccl(
    store: str, rank: int, size: int, backend: str | None, function: Callable[..., Any], *args: Any
) -> Any:
    """Call ``function`` in a world of NCCL."""
    num_gpus = torch.cuda.device_count()
    torch.cuda.set_device(rank % num_gpus)
    if num_gpus < size:
        os.environ["NCCL_HOSTID"] = f"rank-{rank}"
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.manual_seed(0)
    group = meet(store, rank, size, backend)
    assert backend_of(group, torch.device("cuda")) == "nccl"
    result = function(*args)
    torch.cuda.synchronize()
    dist.barrier(device_ids=[torch.cuda.current_device()])
    dist.destroy_process_group()
    leftovers.kept_open.add("NCCL")
    return result


BY_NCCL_ALONE = ["8 bits", "kept", "two hops", "replicas"]


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, None) for case in CASES | MORE_CASES), *((case, "nccl") for case in BY_NCCL_ALONE)],
)
def test_nccl_trains_as_cpus_do_bit_for_bit(run: Run, case: str, backend: str | None) -> None:
    chosen = (CASES | MORE_CASES)[case]
    by_cpu = run(chosen.ranks, alike.trained, chosen, "cpu")
    by_nccl = run(chosen.ranks, over_nccl, backend, alike.trained, chosen, "cuda")
    assert_equal(by_nccl, by_cpu)


@pytest.mark.parametrize("case", RACES)
def test_delays_on_the_streams_change_nothing(run: Run, case: str) -> None:
    chosen = RACES[case]
    expected = run(chosen.ranks, over_nccl, None, alike.trained_in_order, chosen, "cuda")
    for seed in range(2):
        found = run(chosen.ranks, over_nccl, None, alike.trained, chosen, "cuda", seed)
        assert_equal(found, expected)


# Of other cases only the odd rank hears, over NCCL, and ends the others.
TOLD_BY_ALL = ["at the first step", "when all change"]


def _told(config: dict[str, Any]) -> list[str]:
    return [train_apart(APART[each][0], 1, config, "cuda")[0] for each in TOLD_BY_ALL]


@pytest.mark.parametrize("backend", BACKENDS, ids=["both", "nccl alone"])
@pytest.mark.parametrize("gather", ["twice", "once"])
def test_all_ranks_say_which_gradients_differ(run: Run, gather: str, backend: str | None) -> None:
    for told in run(2, over_nccl, backend, _told, {"gather": gather}):
        assert all("has no gradient of blocks.1." in message for message in told)


def _pass_without_waiting(case: Case) -> None:
    model, _ = alike.make(case, "cuda")
    for step in range(2):
        alike.take_step(model, case, step, "cuda", [])
    batch = alike.constants(model, 7, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    "case",
    [Case(), Case(prefetch=True, config={"gather": "once", "weight_bits": 4, "grad_bits": 4})],
    ids=["8 bits", "kept, 4 bits, prefetched"],
)
def test_the_host_never_waits_for_the_wire(run: Run, case: Case) -> None:
    run(2, over_nccl, None, _pass_without_waiting, case)


def _traffic(case: Case, device: str) -> tuple[dict[str, Any], list[Tensor]]:
    model, handle = alike.make(case, device)
    grads: list[Tensor] = []
    alike.take_step(model, case, 0, device, grads)
    sent = handle.traffic.snapshot()
    handle.remove()
    return sent, [grad.cpu() for grad in grads]


def test_a_step_sends_what_it_sends_on_cpus(run: Run) -> None:
    case = Case(config={"weight_bits": 4, "grad_bits": 4})
    by_cpu = run(2, _traffic, case, "cpu")
    by_nccl = run(2, over_nccl, None, _traffic, case, "cuda")
    assert [sent for sent, _ in by_nccl] == [sent for sent, _ in by_cpu]
    assert_equal([grads for _, grads in by_nccl], [grads for _, grads in by_cpu])
