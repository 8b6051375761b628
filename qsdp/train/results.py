"""The folder of results while it holds what an earlier run left: that stays until the first
checkpoint of this run is on disk, so that at no instant there is neither."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from qsdp import checkpoint
from qsdp.files import write_text

CHECKPOINTS = "checkpoints"
DENSE_TWIN = "dense-twin"
"""Folder, in that of the results, of the dense twin of AC/DC's model."""
METRICS = "metrics.jsonl"


def restore(out: Path) -> None:
    """Give back their names to the checkpoints that a history has set aside which then came to no
    checkpoint of its own."""
    for folder in (CHECKPOINTS, DENSE_TWIN):
        root = out / folder
        set_aside, newest = checkpoint.aside(root), checkpoint.latest(root)
        if set_aside and (newest is None or _history(newest) == _history(set_aside[-1])):
            checkpoint.restore_aside(root)


def _history(path: Path) -> object:
    return checkpoint.read_meta(path).get("history")


@dataclass
class Results:
    """What is done in OUT when. All ranks have the same; one calls the methods that write.

    A history is a line of steps that checkpoints were made from one after the other: a run that
    begins anew, or goes back to an earlier checkpoint, begins a new one.
    """

    out: Path
    config: str
    """What OUT/config.toml is to hold."""
    history: str
    """Names the history."""
    began_at: int
    """The step after which this process, or the history before it, goes on."""
    replaces: bool
    """Whether OUT holds checkpoints of another history, to be replaced."""
    has_lines: bool
    """Whether the lines of OUT/metrics.jsonl up to `began_at` are those of this history."""
    outdated: list[str] = field(default_factory=list)
    """Folders that hold what goes when this history has a checkpoint there."""

    def begin(self, before: str | None) -> tuple[list[str], list[str]]:
        """Make OUT ready; `before` is the history of the checkpoint that the run goes on from.

        Returns what was removed, which attempts left that never had a checkpoint, and `outdated`.
        """
        removed = []
        newest = checkpoint.latest(self.out / CHECKPOINTS)
        kept = (before, None if newest is None else _history(newest))
        for path in sorted(self.out.glob("metrics.*.jsonl")):
            if path.name in [f"metrics.{history}.jsonl" for history in kept]:
                path.replace(self.out / METRICS)  # a crash after its first checkpoint left it
            else:
                removed.append(path)
        removed += self.out.glob("metrics.*.jsonl.tmp")  # of histories that nobody goes on with
        if not self.replaces:
            write_text(self.out / "config.toml", self.config)
            removed += [] if self.has_lines else [self.out / METRICS]
        removed = [path for path in removed if path.exists()]
        for path in removed:
            path.unlink()
        outdated = [
            folder
            for folder in (CHECKPOINTS, DENSE_TWIN)
            if checkpoint.outdated(self.out / folder, self.began_at)
        ]
        return [path.name for path in removed], outdated

    @property
    def metrics(self) -> Path:
        """Where metrics go until `settle`."""
        return self.out / (f"metrics.{self.history}.jsonl" if self.replaces else METRICS)

    def latest(self, folder: str) -> Path | None:
        """The newest checkpoint of this history in `folder`."""
        until = self.began_at if folder in self.outdated else math.inf
        return checkpoint.latest(self.out / folder, until)

    def set_aside(self, folder: str) -> None:
        """Make room for this history's first checkpoint in `folder`."""
        checkpoint.set_aside(self.out / folder, self.began_at)

    def remove_aside(self, folder: str) -> list[str]:
        """That checkpoint is there: delete what it replaces. Returns what that was."""
        removed = self._remove_summary() if folder == CHECKPOINTS else []
        return removed + [f"{folder}/{name}" for name in checkpoint.remove_aside(self.out / folder)]

    def settle(self) -> list[str]:
        """The first checkpoint is there: delete what is left of earlier histories."""
        removed = []
        for folder in self.outdated:
            self.set_aside(folder)
            removed += self.remove_aside(folder)
        removed += self._remove_summary()
        if self.replaces:
            write_text(self.out / "config.toml", self.config)
        return removed

    def _remove_summary(self) -> list[str]:
        """Delete the summary of an earlier state, which nobody is to find without its run."""
        summary = self.out / "summary.json"
        if not summary.exists():
            return []
        summary.unlink()
        return [summary.name]
