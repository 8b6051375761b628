"""Accelerate, and so transformers' Trainer, with FSDP2 on the CPU ranks of a pool."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist


@contextmanager
def fsdp2_on_cpus() -> Iterator[None]:
    """Inside, Accelerate shards on CPUs as it does on GPUs: it would take DDP by itself.

    It finds the ranks in the environment, as torchrun tells them.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def sharding(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None:
            kind = DistributedType.FSDP
            self.distributed_type = PartialState._shared_state["distributed_type"] = kind
            self.fsdp_plugin = plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with (
        mock.patch.dict(os.environ, told),
        mock.patch.object(AcceleratorState, "__init__", sharding),
    ):
        try:
            yield
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
