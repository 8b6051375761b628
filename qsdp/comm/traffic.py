"""Counts the bytes that this rank sends, by direction and link."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from qsdp.comm.topology import Topology

DIRECTIONS = ("gather", "reduce", "other")
LINKS = ("intra_node", "inter_node")


class Traffic:
    """Cumulative counters of one handle.

    A payload counts once for every peer that it is meant for, header, metadata and raw parts
    included; transport headers are not. `*_fp32_bytes` is what the same gathers and reduces would
    have sent in fp32, each value once: 4 (N - 1) / N bytes a value of the gathered buffer.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._counts: Counter[str] = Counter()
        self._is_paused = False

    def sent(
        self, direction: str, group: dist.ProcessGroup, payload_bytes: int, num_values: int
    ) -> None:
        """Count one payload of ``payload_bytes`` to every other rank of ``group``.

        ``num_values`` is this rank's share of the flat buffer, in values.
        """
        intra, inter = self._topology.num_peers(group)
        kind = "other" if self._is_paused else direction
        self._counts[f"{kind}_intra_node_bytes"] += intra * payload_bytes
        self._counts[f"{kind}_inter_node_bytes"] += inter * payload_bytes
        if not self._is_paused:
            self._counts[f"{direction}_fp32_bytes"] += 4 * (intra + inter) * num_values

    def other(self, num_bytes: int) -> None:
        """Count ``num_bytes`` that are neither a gather nor a reduce of training."""
        self._counts["other_intra_node_bytes"] += num_bytes

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, whatever is sent counts as `other`: validation, say."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def snapshot(self) -> dict[str, int]:
        """All counters since install, in bytes: `<direction>_<link>_bytes`,
        `<direction>_sent_bytes` (both links) and `<direction>_fp32_bytes`."""
        counts = {f"{d}_{link}_bytes": 0 for d in DIRECTIONS for link in LINKS}
        counts |= {"gather_fp32_bytes": 0, "reduce_fp32_bytes": 0} | dict(self._counts)
        for direction in DIRECTIONS:
            counts[f"{direction}_sent_bytes"] = sum(
                counts[f"{direction}_{link}_bytes"] for link in LINKS
            )
        return counts
