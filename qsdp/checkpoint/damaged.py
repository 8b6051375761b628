"""The error of a damaged checkpoint."""

from __future__ import annotations

from pathlib import Path


class Damaged(ValueError):
    """A checkpoint is damaged: a file of it is missing, truncated or altered."""

    def __init__(self, checkpoint: Path, name: str, why: str) -> None:
        super().__init__(checkpoint, name, why)
        self.checkpoint, self.file, self.why = checkpoint, checkpoint / name, why

    @property
    def fact(self) -> str:
        """What is damaged, and how, as it stands within a sentence."""
        return f"{self.file} is damaged ({self.why})"

    def __str__(self) -> str:
        return f"{self.fact}: name another checkpoint."
