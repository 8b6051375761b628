"""Solvers that score every weight for itself: the largest scores stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from qsdp.common.bitmask import PackedMask
from qsdp.sparsity import prune_and_round, streaming
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.prunable import Prunable
from qsdp.sparsity.prune_and_round import Score


@dataclass(frozen=True)
class ByScore:
    """A solver by scores, one function: weights of the smallest scores are pruned.

    Those that stay keep their values, or are rounded to the target's bits. Where all matrices
    compete (scope ``global``), so do scores of all of them.
    """

    score: Score
    needs_tokens: ClassVar[bool] = False

    def compress_(
        self, model: nn.Module, prunable: Prunable, target: Compression, tokens: Tensor | None
    ) -> list[PackedMask]:
        """Compress the model's shards in place, by their scores."""
        return prune_and_round.prune_and_round_(
            prunable.shards(), target, prunable.dims, self.score
        )

    def num_reads(self, target: Compression) -> int:
        """How often a stream of tensors is read."""
        return streaming.num_reads(target)

    def compress_stream(
        self, tensors: Sequence[streaming.StoredTensor], target: Compression
    ) -> Iterator[tuple[Tensor, PackedMask]]:
        """Compress a stream of tensors, by their scores."""
        return streaming.compress_stream(tensors, target, self.score)
