"""Which backend and which device serve what, however the default process group was made."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.comm import transport
from qsdp.compat.process_groups import backend_of, control_device
from tests_distributed.support import alike
from tests_distributed.support.alike import Case
from tests_distributed.support.apart import APART, train_apart
from tests_distributed.support.pool import meet, meets_by_itself
from tests_distributed.support.running import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Group:
    """What qsdp asks of a process group, as torch answers: devices in no certain order."""

    def __init__(self, backends: Mapping[str, str]) -> None:
        self._backends = backends
        self._device_types = [torch.device(kind) for kind in backends]

    def _get_backend(self, device: torch.device) -> Any:
        return SimpleNamespace(name=lambda: self._backends[device.type])


# Of each group: the device of control messages, whether a GPU's payloads go through host memory,
# and whether their headers are read.
GROUPS: dict[str, tuple[dict[str, str], torch.device, bool, bool]] = {
    "init_process_group() with a GPU": ({"cuda": "nccl", "cpu": "gloo"}, CPU, False, False),
    "cpu:gloo,cuda:nccl": ({"cpu": "gloo", "cuda": "nccl"}, CPU, False, False),
    "nccl": ({"cuda": "nccl"}, GPU, False, False),
    "gloo": ({"cpu": "gloo", "cuda": "gloo"}, CPU, True, True),
    "another's, for GPUs": ({"cuda": "another"}, GPU, False, False),
    "cpu:gloo,cuda:another": ({"cpu": "gloo", "cuda": "another"}, CPU, False, False),
}


@pytest.mark.parametrize("name", GROUPS)
def test_what_serves_a_gpu_follows_from_the_groups_backends(name: str) -> None:
    backends, control, is_staged, is_seen = GROUPS[name]
    group: Any = Group(backends)
    assert control_device(group) == control
    assert backend_of(group, GPU) == backends["cuda"]
    assert transport.is_staged(group, GPU) == is_staged
    assert transport.host_can_read(group, GPU) == is_seen
    assert not transport.is_staged(group, CPU)
    assert transport.host_can_read(group, CPU)


Made = tuple[str, torch.device, str, list[Tensor], list[str]]
FOUND_APART = ("at the first step", "after good steps")
BACKENDS = {None: "undefined", "cpu:gloo,cuda:fake": "cpu:gloo,cuda:fake"}


@meets_by_itself
def _made(store: str, rank: int, size: int, backend: str | None, case: Case) -> Made:
    """What torch and qsdp call it, a training's numbers, what ranks say that differ."""
    group = meet(store, rank, size, backend)
    found = control_device(group), backend_of(group, CPU)
    numbers = alike.trained(case, "cpu")
    told = [train_apart(APART[name][0], 1, case.config)[0] for name in FOUND_APART]
    name = dist.get_backend()
    dist.barrier()
    dist.destroy_process_group()
    return name, *found, numbers, told


@pytest.mark.parametrize(
    "case",
    [
        Case(num_steps=2),
        Case(ranks=4, num_steps=2, config={"ranks_per_node": 2, "reduce": "two-hop"}),
    ],
    ids=["flat", "two hops"],
)
def test_a_group_made_without_naming_gloo_alone_trains_as_gloo_does(run: Run, case: Case) -> None:
    expected = run(case.ranks, alike.trained, case, "cpu")
    for backend, called in BACKENDS.items():
        found = run(case.ranks, _made, backend, case)
        for (name, device, serves, numbers, told), wanted in zip(found, expected, strict=True):
            assert (name, device, serves) == (called, CPU, "gloo")
            assert all(torch.equal(*pair) for pair in zip(numbers, wanted, strict=True))
            assert all("has no gradient of blocks.1." in message for message in told)
