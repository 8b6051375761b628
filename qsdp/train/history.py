"""The folder of results while it holds what another history left.

That stays until the first checkpoint of this one is on disk, so that at no instant there is
neither.

A history is a line of steps that checkpoints were made from one after the other, with the same
settings. A run that begins anew, goes back to an earlier checkpoint, or goes on with other settings
begins a new one. Until its first checkpoint all that it writes lies beside: metrics.HISTORY.jsonl,
config.HISTORY.toml, and FOLDER.HISTORY for each folder in which the method keeps models. The first
checkpoint, which names its history, decides: ``commit`` then removes the rest of the old one and
gives the new files their names, those of the metrics last. So who finds them beside knows what a
crash cut short.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qsdp import checkpoint
from qsdp.checkpoint import Damaged
from qsdp.common.atomic_files import remove_tree, write_text
from qsdp.methods.registry import kept_folders
from qsdp.report.plots import PLOT_NAMES
from qsdp.report.summary_json import read_summary
from qsdp.train.verify_together import verify_together
from qsdp.train.world import World

CHECKPOINTS = "checkpoints"
CONFIG = "config.toml"
METRICS = "metrics.jsonl"
_BESIDE = re.compile(
    r"metrics\.[0-9a-f]{8}\.jsonl(\.tmp)?|config\.[0-9a-f]{8}\.toml(\.tmp)?"
    rf"|({'|'.join(map(re.escape, kept_folders()))})\.([0-9a-f]{{8}}|old)"
)


def recover(out: Path, world: World) -> tuple[list[str], int | None]:
    """Finish what a history was at when it ended, if its first checkpoint is there. A collective.

    Returns what was removed, and the step that this history went on from; None if there is none.
    """
    for path, history, went_on_from in world.on_main(lambda: _unfinished(out)):
        if verify_together(path, world) is None:  # else it is no reason to delete others
            removed = world.on_main(partial(commit, out, history, went_on_from))
            return removed, went_on_from
    return [], None


def _unfinished(out: Path) -> list[tuple[Path, str, int]]:
    """The checkpoints of a history whose metrics lie beside, with ``_history`` of each."""
    found = []
    for path in checkpoint.steps(out / CHECKPOINTS).values():
        with contextlib.suppress(ValueError):  # what cannot be read may be nobody's concern
            history, went_on_from = _history(path)
            if _beside(out, METRICS, history).exists():
                found.append((path, history, went_on_from))
    return found


def commit(out: Path, history: str, went_on_from: int) -> list[str]:
    """Delete what is left of others than ``history``, whose first checkpoint is there.

    That is what comes after the step that it went on from. Returns what that was. Any part of it
    may have been done before. Raises OSError for what cannot be: the metrics then still lie beside,
    and whoever finds them does the rest.
    """
    is_new = _beside(out, METRICS, history).exists()
    plots = [out / "plots" / f"{name}.png" for name in PLOT_NAMES]
    # None of these is to be found without the checkpoints that it is of.
    is_own = read_summary(out).get("history") == history
    outcome = [path for path in (out / "summary.json", *plots) if path.exists() and not is_own]
    for path in outcome:
        path.unlink()
    removed = [str(path.relative_to(out)) for path in outcome]
    if _beside(out, CONFIG, history).exists():
        _beside(out, CONFIG, history).replace(out / CONFIG)
    for folder in (*kept_folders(), CHECKPOINTS):
        for step, path in checkpoint.steps(out / folder).items():
            remark = _outdated(path, history, is_new=is_new) if step > went_on_from else None
            if remark is not None:
                _remove_checkpoint(path)
                removed.append(f"{folder}/{path.name}{remark}")
    # Until all of that is done a kept model is where ``HistoryFolder.latest_kept`` looks for it.
    for folder in kept_folders():
        own, old = _beside(out, folder, history), out / f"{folder}.old"
        if not own.exists():
            continue
        remove_tree(old)
        if (out / folder).exists():
            removed += [folder] if checkpoint.steps(out / folder) else []
            (out / folder).rename(old)
        own.rename(out / folder)
        with contextlib.suppress(OSError):  # the next start tries again
            remove_tree(old)
    if is_new:
        _beside(out, METRICS, history).replace(out / METRICS)
    return removed


def _outdated(path: Path, history: str, *, is_new: bool) -> str | None:
    """A remark on a checkpoint that is another history's; None for one that stays.

    That is this one's, and what may be. A new history has none yet but its first one.
    """
    try:
        return "" if _history(path)[0] != history else None
    except Damaged:
        return " (damaged)" if is_new else None
    except ValueError:
        return None


def _history(path: Path) -> tuple[str, int]:
    """The history of a checkpoint, and the step it went on from. Raises as ``read_meta``."""
    meta = checkpoint.read_meta(path)
    history, went_on_from = meta.get("history", ""), meta.get("went_on_from")
    return str(history), went_on_from if isinstance(went_on_from, int) else 0


def _remove_checkpoint(path: Path) -> None:
    try:
        checkpoint.remove(path)
    except OSError:
        if path.exists():  # else it is out of the way, and the next save deletes it
            raise


def _beside(out: Path, name: str, history: str) -> Path:
    """Where a history has the file or folder ``name`` while those of another one are there."""
    stem, dot, suffix = name.partition(".")
    return out / f"{stem}.{history}{dot}{suffix}"


@dataclass(frozen=True)
class HistoryStart:
    """Where a run begins, and the history that it is part of."""

    history: str
    """The name of its history."""
    source: Path | None = None
    """The checkpoint to go on from."""
    meta: dict[str, Any] | None = None
    """What ``read_meta`` says of it."""
    origin: str | None = None
    """The path that --resume named, if the history came of one."""
    went_on_from: int = 0
    """The step before the first of the history."""
    is_beside: bool = False
    """Whether OUT holds checkpoints of another history, which the first one here replaces."""
    has_past: bool = False
    """Whether what OUT holds up to that step is the past of this history."""


class HistoryFolder:
    """The folder OUT through a history: what is done in it when.

    All ranks have the same; one calls the methods that write.
    """

    def __init__(self, out: Path, config: str, start: HistoryStart) -> None:
        """Take ``config``, which is what OUT/config.toml is to hold."""
        self.out, self.start, self._config = out, start, config
        self.is_beside = start.is_beside
        """Whether the first checkpoint is still to come, where another history is there."""

    def begin(self) -> list[str]:
        """Make OUT, which ``recover`` has seen, ready.

        Returns what was removed: what attempts left that never had a checkpoint.
        """
        removed = [path for path in sorted(self.out.iterdir()) if _BESIDE.fullmatch(path.name)]
        if not self.is_beside and not self.start.has_past:
            names = (METRICS, *kept_folders())
            removed += [path for name in names if (path := self.out / name).exists()]
        for path in removed:
            remove_tree(path)
        write_text(self.path(CONFIG), self._config)
        return [path.name for path in removed]

    def path(self, name: str) -> Path:
        """Where the file or folder ``name`` is until ``settle``."""
        return _beside(self.out, name, self.start.history) if self.is_beside else self.out / name

    def latest_kept(self, folder: str, without: Collection[Path] = ()) -> Path | None:
        """What this history and its past keep in ``folder``.

        Models of which ``without`` has the real paths are left out.
        """
        own = checkpoint.latest(self.path(folder), without=without)
        if own is None and self.is_beside and self.start.has_past:
            return checkpoint.latest(self.out / folder, self.start.went_on_from, without)
        return own

    def settle(self) -> list[str]:
        """Go on from the first checkpoint. Returns what was removed. Raises as ``commit``."""
        removed = commit(self.out, self.start.history, self.start.went_on_from)
        self.is_beside = False
        return removed
