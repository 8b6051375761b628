"""Which ranks share a machine."""

import os
from functools import lru_cache

import torch.distributed as dist


class Topology:
    """Nodes of ``ranks_per_node`` consecutive global ranks, as torchrun numbers them.

    Without ``ranks_per_node`` the launcher's LOCAL_WORLD_SIZE counts; without that, every rank is
    taken to be on a node of its own.
    """

    def __init__(self, ranks_per_node: int | None = None) -> None:
        self.ranks_per_node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.num_peers = lru_cache(maxsize=None)(self._num_peers)

    def node(self, global_rank: int) -> int:
        return global_rank // self.ranks_per_node

    def _num_peers(self, group: dist.ProcessGroup) -> tuple[int, int]:
        """How many other ranks of ``group`` are on this rank's node, and how many are not."""
        ranks = dist.get_process_group_ranks(group)
        here = self.node(dist.get_rank())
        inside = sum(self.node(rank) == here for rank in ranks)
        return inside - 1, len(ranks) - inside
