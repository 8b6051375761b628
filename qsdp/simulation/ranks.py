"""The ranks that are simulated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qsdp.common.dtypes import CODEC_DTYPES


@dataclass(frozen=True, kw_only=True)
class SimulatedRanks:
    """The simulated ranks: global rank = replica * world_size + rank in the shard group."""

    world_size: int
    """Ranks of the shard axis."""
    ranks_per_node: int = 1
    replicas: int = 1
    """Ranks of the replicate axis (HSDP)."""
    quantized_replicas: bool = False
    """Whether the all-reduce between replicas is qsdp's, or FSDP2's own."""
    param_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("world_size", "ranks_per_node", "replicas"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: choose a whole number from 1 on.")
        for name in ("param_dtype", "reduce_dtype"):
            if getattr(self, name) not in CODEC_DTYPES:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: choose torch.float32, torch.bfloat16 or "
                    "torch.float16."
                )
        if self.quantized_replicas and (self.replicas == 1 or self.world_size == 1):
            raise ValueError(
                f"quantized_replicas is on for {self.replicas} replicas of {self.world_size} "
                "ranks: give 2 or more of both, or leave it off."
            )

    @property
    def num_ranks(self) -> int:
        """All ranks, replicas included."""
        return self.world_size * self.replicas

    @property
    def has_even_nodes(self) -> bool:
        """Whether every node has as many ranks of the shard group as any other."""
        small, large = sorted((self.ranks_per_node, self.world_size))
        return self.ranks_per_node >= self.num_ranks or large % small == 0

    @property
    def ranks_of_a_node(self) -> int:
        """Ranks of the shard group on one node, where nodes are even."""
        return min(self.ranks_per_node, self.world_size)
