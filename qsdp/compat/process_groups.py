"""Process groups of qsdp's own, and the devices and backends of any."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_num_names: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def unique_group_name(parent: dist.ProcessGroup) -> str:
    """A name for a process group of ranks of ``parent``, which none had before.

    It is the same on all its ranks, which ask for names equally often.
    """
    _num_names[parent] = number = _num_names.get(parent, 0) + 1
    return f"qsdp {number} of {parent.group_name}"


def new_group(
    ranks: list[int], parent: dist.ProcessGroup, name: str, backend: str | None = None
) -> dist.ProcessGroup:
    """A process group of ``ranks``, which alone call this, with the timeout of ``parent``.

    It has the parent's backends too, where no other ``backend`` is given. ``dist.new_group`` lets
    ranks meet at a name with the number of groups that each knows. Ranks may know of different
    groups, and once one was destroyed the next has its name.
    """
    world = distributed_c10d._world
    timeout = parent._get_backend(control_device(parent)).options._timeout
    _, store = world.pg_map[distributed_c10d._get_default_group()]
    backend = backend or dist.get_backend_config(parent)
    # By one name where it is one for all devices: torch warns when it destroys one of a list.
    names = {each.rpartition(":")[2] for each in backend.split(",")}
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        distributed_c10d.Backend(names.pop() if len(names) == 1 else backend),
        store,
        cast(Any, name),
        timeout=timeout,
    )
    world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    return group


def destroy_group(group: dist.ProcessGroup) -> None:
    """Destroy a process group, if that was not done together with the default one."""
    if group in distributed_c10d._world.pg_map:
        dist.destroy_process_group(group)


def control_device(group: dist.ProcessGroup) -> torch.device:
    """Where control messages of a process group lie: on the CPU where it serves one.

    Reading them from a GPU waits for all of the stream's work.
    """
    kinds = [device.type for device in group._device_types]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """The backend that serves tensors of ``device`` in a process group: ``gloo``, ``nccl``."""
    name: str = group._get_backend(device).name()
    return name
