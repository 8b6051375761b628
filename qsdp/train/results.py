"""The folder of results while it holds what an earlier run left: that stays until the first
checkpoint of this run is on disk, so that at no instant there is neither."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from qsdp import checkpoint
from qsdp.files import write_text

CHECKPOINTS = "checkpoints"
DENSE_TWIN = "dense-twin"
"""Folder, in that of the results, of the dense twin of AC/DC's model."""
METRICS = "metrics.jsonl"
_BESIDE = re.compile(r"metrics\.[0-9a-f]{8}\.jsonl(\.tmp)?")


def recover(out: Path) -> None:
    """Finish, or undo, what a history was at when it ended: its first checkpoint, which decides, is
    there or is not."""
    for folder in (CHECKPOINTS, DENSE_TWIN):
        root = out / folder
        aside, newest = checkpoint.aside(root), checkpoint.latest(root)
        if aside and (newest is None or _history(newest) == _history(aside[-1])):
            checkpoint.restore_aside(root)
    newest = checkpoint.latest(out / CHECKPOINTS)
    beside = None if newest is None else _metrics(out, _history(newest))
    if beside is not None and beside.exists():
        beside.replace(out / METRICS)


def _history(path: Path) -> str:
    return str(checkpoint.read_meta(path).get("history"))


def _metrics(out: Path, history: str) -> Path:
    """Where a history writes its metrics while those of another one are there."""
    return out / f"metrics.{history}.jsonl"


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

    def begin(self) -> tuple[list[str], list[str]]:
        """Make OUT, which `recover` has seen, ready.

        Returns what was removed, which attempts left that never had a checkpoint, and `outdated`.
        """
        removed = [path for path in sorted(self.out.iterdir()) if _BESIDE.fullmatch(path.name)]
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
        return _metrics(self.out, self.history) if self.replaces else self.out / METRICS

    def latest(self, folder: str) -> Path | None:
        """The newest checkpoint of this history in `folder`."""
        until = self.began_at if folder in self.outdated else math.inf
        return checkpoint.latest(self.out / folder, until)

    def forget(self, folder: str) -> list[str]:
        """Delete what this history's first checkpoint in `folder` took the place of, and return
        what that was."""
        return [f"{folder}/{name}" for name in checkpoint.remove_aside(self.out / folder)]

    def settle(self) -> list[str]:
        """The first checkpoint is there: delete what is left of earlier histories."""
        removed = []
        summary = self.out / "summary.json"
        if summary.exists():  # none is to be found without the checkpoints that it is of
            summary.unlink()
            removed.append(summary.name)
        if self.replaces:
            write_text(self.out / "config.toml", self.config)
        if DENSE_TWIN in self.outdated:  # no twin of this history has taken its place
            checkpoint.set_aside(self.out / DENSE_TWIN, self.began_at)
        for folder in self.outdated:
            removed += self.forget(folder)
        return removed
