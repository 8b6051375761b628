"""The flags that say what a trained model is compressed to. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from qsdp.common.flags import Flags
from qsdp.common.user_errors import quoted
from qsdp.sparsity.compression_target import Compression


@dataclass(frozen=True, kw_only=True)
class CompressionFlags(Flags):
    """What is compressed, by the method or in one shot."""

    one_shot: tuple[str, ...] | None = ("0.5", "0.7", "0.8", "0.9")
    """Targets to compress the final model to in one shot, with commas between; none for no target.
    Each is put back after its validation. Fractions (0.7), N:M patterns (2:4), bits (4bit); +
    joins terms (2:4+4bit, 0.7+layer, 0.5+block4).
    """

    prunable: str | None = None
    """Shell-style patterns of the parameters that may be pruned, with commas between.
    For a method that prunes or --one-shot. Unset: the weights of linear layers inside the
    blocks.
    """

    @property
    def targets(self) -> tuple[Compression, ...]:
        """What the final model is compressed to."""
        texts = self.one_shot or ()
        return () if texts == ("none",) else tuple(map(Compression.of, texts))

    @property
    def patterns(self) -> list[str] | None:
        """The patterns of the prunable set."""
        return None if self.prunable is None else self.prunable.split(",")

    def check(self, *, prunes: bool) -> None:
        """Raise ValueError, naming the flag, for what cannot be; ``prunes``: the method prunes."""
        self.require_contents("prunable")
        try:
            _ = self.targets
        except ValueError as error:
            raise ValueError(f"--one-shot: {quoted(error)}.") from None
        if self.prunable is not None and not prunes and not self.targets:
            raise ValueError(
                f"--prunable is {self.prunable!r}, but no method is to prune, and --one-shot is "
                "none, so that nothing would heed it: add one, or leave it out."
            )
