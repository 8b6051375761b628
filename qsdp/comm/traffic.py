"""Counts the bytes that this rank sends, by direction and link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from qsdp.comm.nodes import Nodes

DIRECTIONS = ("gather", "reduce", "other")
LINKS = ("intra_node", "inter_node")


class Traffic:
    """Counts one handle's traffic: the bytes that this rank sends.

    Payloads count whole, header, metadata and raw parts included; transport headers do not. An
    all-gather counts as the ring that gloo and NCCL make of it: all but one of its payloads go to
    the next rank. Masks that ranks exchange ([Note: Support]) count as gathers. ``*_fp32_bytes`` is
    what the same gathers and reduces would have sent in fp32, each value once, pruned ones too:
    4 (N - 1) / N bytes a value of the gathered buffer.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._counts: Counter[str] = Counter()
        self._is_paused = False

    def gathered(
        self,
        direction: str,
        group: dist.ProcessGroup,
        payload_bytes: int,
        *,
        is_training: bool = False,
    ) -> None:
        """Count an all-gather of ``payload_bytes`` a rank over ``group``.

        ``is_training``: as for ``sent``.
        """
        ranks = dist.get_process_group_ranks(group)
        neighbour = ranks[(group.rank() + 1) % len(ranks)]
        num_bytes = (len(ranks) - 1) * payload_bytes
        self.sent(direction, [neighbour], num_bytes, is_training=is_training)

    def summed(self, group: dist.ProcessGroup, num_bytes: int) -> None:
        """Count an all-reduce of ``num_bytes`` over ``group`` as ``other``.

        In a ring the next rank is sent every byte twice, except an own share.
        """
        ranks = dist.get_process_group_ranks(group)
        neighbour = ranks[(group.rank() + 1) % len(ranks)]
        self.sent("other", [neighbour], 2 * (len(ranks) - 1) * num_bytes // len(ranks))

    def sent(
        self,
        direction: str,
        receivers: Iterable[int],
        payload_bytes: int,
        *,
        is_training: bool = False,
    ) -> None:
        """Count ``payload_bytes`` to each of the global ranks ``receivers``.

        ``is_training``: also while paused, as what is sent then serves the training after it.
        """
        kind = "other" if self._is_paused and not is_training else direction
        here = [self._nodes.is_here(receiver) for receiver in receivers]
        for link, num in zip(LINKS, (sum(here), len(here) - sum(here)), strict=True):
            if num:
                self._counts[f"{kind}_{link}_bytes"] += num * payload_bytes

    def in_fp32(self, direction: str, num_ranks: int, num_values: int) -> None:
        """Count a rank's share of ``num_values`` in fp32, each sent once to all but one rank."""
        if not self._is_paused:
            share = 4 * (num_ranks - 1) * num_values // num_ranks
            self._counts[f"{direction}_fp32_bytes"] += share

    def other(self, num_bytes: int) -> None:
        """Count ``num_bytes`` that are neither a gather nor a reduce of training.

        They go to a rank that nobody names, and count as if it were on this node.
        """
        self._counts["other_intra_node_bytes"] += num_bytes

    def changed(self, num_codes: int, num_buckets: int, *, is_training: bool) -> None:
        """Count what all ranks have said of their weights in a gather of changes.

        Args:
            num_codes: Codes that have changed, on grids that have not.
            num_buckets: Buckets that were drawn again.
            is_training: As for ``sent``.
        """
        if is_training or not self._is_paused:
            self._counts["changed_codes"] += num_codes
            self._counts["redrawn_buckets"] += num_buckets

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, whatever is sent counts as ``other``, for example that of a validation."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def snapshot(self) -> dict[str, int]:
        """All counters since install, in bytes.

        They are ``<direction>_<link>_bytes``, ``<direction>_sent_bytes`` (both links) and
        ``<direction>_fp32_bytes``. With ``gather="delta"`` there are two counts more, of what all
        ranks sent: ``changed_codes`` and ``redrawn_buckets``, whose codes are not among these.
        """
        counts = {f"{d}_{link}_bytes": 0 for d in DIRECTIONS for link in LINKS}
        counts |= {"gather_fp32_bytes": 0, "reduce_fp32_bytes": 0} | dict(self._counts)
        for direction in DIRECTIONS:
            counts[f"{direction}_sent_bytes"] = sum(
                counts[f"{direction}_{link}_bytes"] for link in LINKS
            )
        return counts

    def megabytes(self) -> dict[str, float]:
        """What training has sent, in 10^6 bytes, as trackers show it: in all, and between nodes."""
        counts = self.snapshot()
        links = {"wire_sent_mb": "sent", "wire_between_nodes_mb": "inter_node"}
        return {
            name: (counts[f"gather_{link}_bytes"] + counts[f"reduce_{link}_bytes"]) / 1e6
            for name, link in links.items()
        }
