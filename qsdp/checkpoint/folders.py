"""The folders of checkpoints: which there are, and how one comes and goes in one instant.

step-00000500/             whole: made under another name and renamed when all is on disk
    .metadata  *.distcp    torch.distributed.checkpoint: model and optimizer
    meta.json              the step, checksums of all files and its own, and what the run adds
step-00000500.new/         whole too, and newer than the one beside it, whose name it takes next
tmp-.../                   being written, each save under a name of its own, or removed; what no
                           process claims is a killed one's
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from qsdp.common.atomic_files import remove_tree, sync, unfinished_folder
from qsdp.common.folder_locks import locked_folder, unlocked_folder

META = "meta.json"
_REWRITTEN = ".new"
_REMOVED = "tmp-old-"
_COMPLETE = re.compile(rf"step-(\d{{8,}})({_REWRITTEN})?")


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None if it has another name."""
    named = _COMPLETE.fullmatch(path.name)
    return None if named is None else int(named[1])


def steps(root: Path, without: Collection[Path] = ()) -> dict[int, Path]:
    """The complete checkpoints in ``root`` by their step, oldest first.

    Those of which ``without`` has the real paths are left out.
    """
    if not root.is_dir():
        return {}
    found = {
        step: path
        for path in sorted(root.iterdir())  # .new comes after the one that it replaces
        if path.is_dir() and (step := step_of(path)) is not None and path.resolve() not in without
    }
    return dict(sorted(found.items()))


def latest(root: Path, until: float = math.inf, without: Collection[Path] = ()) -> Path | None:
    """The newest complete checkpoint in ``root`` that is no later than ``until``, if any.

    ``without`` as in ``steps``.
    """
    found = reversed(steps(root, without).items())
    return next((path for step, path in found if step <= until), None)


def resolve(path: Path, without: Collection[Path] = ()) -> Path:
    """The checkpoint that a user means by ``path``: itself, or the newest one in that folder.

    ``without`` as in ``steps``. Raises ValueError if there is none.
    """
    if (path / META).is_file():
        return path
    found = latest(path, without=without) or latest(path / "checkpoints", without=without)
    if found is None and step_of(path) is not None and path.is_dir():
        return path  # which is damaged
    if found is None:
        raise ValueError(
            f"{path} holds no complete checkpoint: give a folder step-N, or that of a run."
        )
    return found


@contextlib.contextmanager
def writing(root: Path, step: int) -> Iterator[Path]:
    """An empty folder, of this call alone, to write the checkpoint of ``step`` into.

    It goes if it is not published. Raises OSError if it cannot be made.
    """
    path = root / f"tmp-step-{step:08d}-{secrets.token_hex(4)}"
    # Just made, and not locked yet, it looks to another run's ``clear_killed`` like a killed one's.
    with unfinished_folder(path, is_waiting=True) as folder:
        yield folder


def clear_killed(root: Path, damaged: Collection[Path] = ()) -> list[str]:
    """Make the folder ``root`` if there is none; finish or remove what killed writers left in it.

    Returns a line for each thing that was removed, except what was about to be, and for each that
    cannot be removed.
    """
    root.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for path in sorted(root.iterdir()):
        is_rewritten = path.name.endswith(_REWRITTEN) and step_of(path) is not None
        if not path.is_dir() or not (is_rewritten or path.name.startswith("tmp-")):
            continue
        with _tidying(path, lines), unlocked_folder(path) as is_free:
            if not is_free:  # what another process makes is its own
                continue
            if is_rewritten and path.resolve() not in damaged:  # else the old one is better
                _settle(path)
                continue
            remove(path) if is_rewritten else remove_tree(path)
            if not path.name.startswith(_REMOVED):
                lines.append(f"{path}, which a killed run left, is removed")
    return lines


def publish(
    folder: Path,
    step: int,
    files: Mapping[str, str],
    keep: int,
    damaged: Collection[Path] = (),
) -> tuple[Path, list[str]]:
    """Let the folder that ``writing`` made, with the texts ``files``, take the name of ``step``.

    All or nothing: of two that do so at once for one step, the later one's stays. Afterwards what
    is ``damaged`` there (real paths) goes, and the oldest of the checkpoints before this one, until
    ``keep`` are left. Later ones stay.

    Returns where it is, and a line for each thing that could not be removed.
    """
    root, final = folder.parent, folder.with_name(f"step-{step:08d}")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        sync(folder / name)
    sync(folder)
    lines: list[str] = []
    with locked_folder(root):
        is_again = final.exists()  # never without one of the two: see ``steps``
        path = folder.rename(final.with_name(final.name + _REWRITTEN) if is_again else final)
        sync(root)
        if is_again:
            with _tidying(final, lines):
                _settle(path)
            path = path if path.exists() else final
    with _tidying(root, lines):
        old = [p for p in damaged if p.name != final.name and p.parent == root.resolve()]
        before = [p for number, p in steps(root, damaged).items() if number < step]
        for each in (*old, *before[: max(0, len(before) + 1 - keep)]):
            with _tidying(each, lines):
                remove(each)
    return path, lines


def remove(path: Path) -> None:
    """Delete a checkpoint so that no instant shows half of it under its name.

    Raises OSError if it cannot be: what has lost its name then goes with the next save beside it.
    """
    with contextlib.suppress(FileNotFoundError):  # another process has removed it
        remove_tree(_set_aside(path))


def _set_aside(path: Path) -> Path:
    # A name of its own: nobody else renames to it.
    return path.rename(path.with_name(f"{_REMOVED}{secrets.token_hex(4)}-{path.name}"))


def _settle(path: Path) -> None:
    """Let a checkpoint that was written again take the place of the old one."""
    final = path.with_name(path.name.removesuffix(_REWRITTEN))
    old = _set_aside(final) if final.exists() else None
    try:
        path.rename(final)
    finally:
        if old is not None:
            remove_tree(old)
    sync(path.parent)


@contextlib.contextmanager
def _tidying(path: Path, lines: list[str]) -> Iterator[None]:
    """Inside, ``path`` is removed; if it cannot be, that is a line of ``lines`` and no error."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        lines.append(f"{path} cannot be removed yet ({why}), and the next save there tries again.")
