"""What a solver is: [Note: Solver]. No torch is loaded here.

[Note: Solver] A solver compresses the prunable matrices of a trained model to a target
(``Compression``), in place or in a stream. It decides which weights stay and what they become, and
keeps what every target promises:

- Exactly as many weights are zero as the target says, ties cut by position; in each group for N:M
  patterns and blocks.
- A pruned weight is +0.0, and no other parameter changes.
- The outcome is the same on any number of ranks, and the same streamed as in memory.

It draws on the weights alone, or on calibration tokens too (``needs_tokens``), which it runs the
model on. One that scores every weight for itself is a ``ByScore``, with all of this done; one whose
scores come of a pass over tokens collects what they need in its ``compress_``, and lets a
``ByScore`` of them do the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qsdp.common.bitmask import PackedMask
    from qsdp.sparsity.compression_target import Compression
    from qsdp.sparsity.prunable import Prunable
    from qsdp.sparsity.streaming import StoredTensor


@runtime_checkable
class Solver(Protocol):
    """A solver: what compresses a model, see [Note: Solver]."""

    @property
    def needs_tokens(self) -> bool:
        """Whether ``compress_`` takes calibration tokens.

        Such a solver does not stream: the commands, which have no tokens to give, refuse it.
        """

    def compress_(
        self, model: nn.Module, prunable: Prunable, target: Compression, tokens: Tensor | None
    ) -> list[PackedMask]:
        """Compress ``model`` in memory, in place, under ``torch.no_grad``. A collective.

        Args:
            model: Plain or sharded by FSDP2, resharded, in no forward or backward pass.
            prunable: The matrices that may change, which can have the target (``Prunable.check``).
            target: What to compress to.
            tokens: int64 [sequences, context], the same on every rank; None unless
                ``needs_tokens``.

        Returns:
            What was kept of this rank's part of each matrix.
        """

    def num_reads(self, target: Compression) -> int:
        """How often ``compress_stream`` reads every tensor, for the time that is left."""

    def compress_stream(
        self, tensors: Sequence[StoredTensor], target: Compression
    ) -> Iterator[tuple[Tensor, PackedMask]]:
        """Compress the matrices of a model that may be larger than memory, in one process.

        Args:
            tensors: In the order of ``Prunable.names``, each to be in memory only while it is
                looked at, and to be read again where needed.
            target: What to compress to.

        Yields:
            Each tensor compressed, and what of it was kept, in their order.
        """
