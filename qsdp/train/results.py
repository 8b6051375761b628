"""The folder of results while it holds what another history left: that stays until the first
checkpoint of this one is on disk, so that at no instant there is neither.

A history is a line of steps that checkpoints were made from one after the other, with the same
settings. A run that begins anew, goes back to an earlier checkpoint, or goes on with other settings
begins a new one. Until its first checkpoint all that it writes lies beside: metrics.HISTORY.jsonl,
dense-twin.HISTORY. The first checkpoint, which names its history, decides: `commit` then removes
the rest of the old one and gives the new files their names, those of the metrics last. So who finds
them beside knows what a crash cut short.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qsdp import checkpoint
from qsdp.files import remove_tree, write_text
from qsdp.train.plots import PLOT_NAMES

CHECKPOINTS = "checkpoints"
DENSE_TWIN = "dense-twin"
"""Folder, in that of the results, of the dense twin of AC/DC's model."""
METRICS = "metrics.jsonl"
PLOTS = "plots"
SUMMARY = "summary.json"
_OLD_TWIN = f"{DENSE_TWIN}.old"
_BESIDE = re.compile(r"metrics\.[0-9a-f]{8}\.jsonl(\.tmp)?|dense-twin\.([0-9a-f]{8}|old)")


def recover(out: Path) -> list[str]:
    """Finish what the history of the newest checkpoint was at when it ended, or undo what another
    one had begun. Returns what was removed."""
    root = out / CHECKPOINTS
    newest = checkpoint.latest(root)
    history = "" if newest is None else str(checkpoint.read_meta(newest).get("history"))
    if _metrics(out, history).exists():
        return commit(out, history)
    checkpoint.restore_aside(root)
    return []


def commit(out: Path, history: str) -> list[str]:
    """The first checkpoint of `history` is there: delete what is left of others. Returns its names.

    Any part of it may have been done before.
    """
    removed = _remove_outcome(out)
    names = checkpoint.remove_aside(out / CHECKPOINTS)
    removed += [f"{CHECKPOINTS}/{name}" for name in names]
    twin = out / DENSE_TWIN
    if _twin(out, history).exists():
        if twin.exists():
            remove_tree(out / _OLD_TWIN)
            twin.rename(out / _OLD_TWIN)
            removed.append(DENSE_TWIN)
        _twin(out, history).rename(twin)
        remove_tree(out / _OLD_TWIN)
    if _metrics(out, history).exists():
        _metrics(out, history).replace(out / METRICS)
    return removed


def _remove_outcome(out: Path) -> list[str]:
    """None of this is to be found without the checkpoints that it is of."""
    plots = [out / PLOTS / f"{name}.png" for name in PLOT_NAMES]
    found = [path for path in (out / SUMMARY, *plots) if path.exists()]
    for path in found:
        path.unlink()
    return [str(path.relative_to(out)) for path in found]


def _metrics(out: Path, history: str) -> Path:
    return out / f"metrics.{history}.jsonl"


def _twin(out: Path, history: str) -> Path:
    return out / f"{DENSE_TWIN}.{history}"


@dataclass
class Results:
    """What is done in OUT when. All ranks have the same; one calls the methods that write."""

    out: Path
    config: str
    """What OUT/config.toml is to hold."""
    history: str
    """Names the history."""
    began_at: int
    """The step that this process, or its history, goes on from."""
    is_beside: bool
    """Whether OUT holds checkpoints of another history, which the first one here replaces."""
    has_past: bool
    """Whether what OUT holds up to `began_at` is the past of this history."""

    def begin(self) -> list[str]:
        """Make OUT, which `recover` has seen, ready. Returns what was removed: what attempts left
        that never had a checkpoint."""
        removed = [path for path in sorted(self.out.iterdir()) if _BESIDE.fullmatch(path.name)]
        if not self.is_beside:
            write_text(self.out / "config.toml", self.config)
            if not self.has_past and (self.out / METRICS).exists():
                removed.append(self.out / METRICS)
        for path in removed:
            remove_tree(path)
        return [path.name for path in removed]

    @property
    def metrics(self) -> Path:
        """Where metrics go until `settle`."""
        return _metrics(self.out, self.history) if self.is_beside else self.out / METRICS

    @property
    def dense_twin(self) -> Path:
        """Where the dense twin goes until `settle`."""
        return _twin(self.out, self.history) if self.is_beside else self.out / DENSE_TWIN

    def latest_twin(self) -> Path | None:
        """The dense twin of this history and its past."""
        own = checkpoint.latest(self.dense_twin)
        if own is None and self.is_beside and self.has_past:
            return checkpoint.latest(self.out / DENSE_TWIN, self.began_at)
        return own

    def settle(self) -> list[str]:
        """The first checkpoint is there. Returns what was removed."""
        removed = _remove_outcome(self.out)
        if self.is_beside:
            write_text(self.out / "config.toml", self.config)
            if not self.dense_twin.exists():
                removed += self._remove_twins()
        return removed + commit(self.out, self.history)

    def _remove_twins(self) -> list[str]:
        """Delete the dense twins that are not of this history's past."""
        folder = self.out / DENSE_TWIN
        if self.latest_twin() is None:
            was_there = folder.exists()
            remove_tree(folder)
            return [DENSE_TWIN] * was_there
        checkpoint.set_aside(folder, self.began_at)
        return [f"{DENSE_TWIN}/{name}" for name in checkpoint.remove_aside(folder)]
