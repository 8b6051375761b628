"""One process among those of a comparison: how they meet, and how rank 0 decides for all."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.support.steps import Setting, size_of
from qsdp.common.allocator import keep_freed_memory

PATIENCE = timedelta(minutes=30)  # a step of a large model on a slow link


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process, and a gloo group of all for what is no part of a step."""

    rank: int
    size: int
    device: torch.device
    control: Any
    mesh: DeviceMesh
    alone: DeviceMesh
    """The mesh of this rank only."""

    @staticmethod
    def meet(arguments: argparse.Namespace) -> Ranks:
        """Join the others, through the environment.

        A comparison has one machine, so that rank i has GPU i wherever its namespace is.
        """
        warnings.simplefilter("ignore", FutureWarning)  # of FSDP2's and DeepSpeed's own calls
        torch.set_num_threads(arguments.threads)
        keep_freed_memory()  # as qsdp's trainer does; all contestants have it
        backend = "cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        rank, device = dist.get_rank(), torch.device("cpu")
        if arguments.device == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        size = dist.get_world_size()
        own = init_device_mesh(device.type, (size, 1), mesh_dim_names=("ranks", "self"))
        return Ranks(
            rank=rank,
            size=size,
            device=device,
            control=control,
            mesh=init_device_mesh(device.type, (size,)),
            alone=own["self"],
        )

    def setting(
        self,
        arguments: argparse.Namespace,
        model: str,
        vocab_size: int,
        powersgd_start: int = 2,
        seed: int = 0,
    ) -> Setting:
        """What all contestants share, for a model of MODELS."""
        size = size_of(model, vocab_size, arguments.context)
        return Setting(
            size=size,
            batch=arguments.tokens // arguments.context,
            device=self.device,
            mesh=self.mesh,
            alone=self.alone,
            groups=min(arguments.groups or size.num_layers, size.num_layers),
            powersgd_rank=arguments.powersgd_rank,
            powersgd_start=powersgd_start,
            seed=seed,
        )

    def barrier(self) -> None:
        """Wait until every rank has done all that it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(self.control)

    def decided(self, decide: Callable[[], Any]) -> Any:
        """What rank 0 decides, on every rank."""
        found = [decide() if self.rank == 0 else None]
        dist.broadcast_object_list(found, src=0, group=self.control)
        return found[0]

    def say(self, text: str) -> None:
        """Print progress, once."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)
