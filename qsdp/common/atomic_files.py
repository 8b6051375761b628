"""Files and folders that are whole or absent: made beside the old, put on disk, then renamed.

What is being made has a name of its own, ending in .tmp or .partial, and its maker holds a lock on
it (flock) that ends with the process. So a killed maker leaves one such thing behind, the next one
takes it over, and nobody touches what another process is still making.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from qsdp.common.folder_locks import has_locked, is_named_so

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the name ``path`` when the body has ended.

    At every instant that is the old file or the new one. Of two processes that write one file the
    second waits. If the body raises, the old file stays.
    """
    temporary = _unfinished(path)
    try:
        with _locked(temporary, lambda: os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)) as file:
            try:
                os.ftruncate(file, 0)
                yield temporary
                sync(temporary)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync(path.parent)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # what the user knows
        raise


def discard_unfinished(path: Path) -> None:
    """Remove what a killed ``replacing`` has left of ``path``, which nobody writes now."""
    _unfinished(path).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file ``path`` by one that holds ``text`` in UTF-8, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder that is whole or absent: it becomes ``out`` when the body has ended.

    Until then its name is ``out``.partial, which only a killed process leaves behind and the next
    call clears.

    Raises ValueError if ``out`` is in use, is being made by another process, or cannot be made or
    written.
    """
    named, out = out, Path(os.path.realpath(out))
    if os.path.ismount(out):
        raise ValueError(f"{named} is a mount point: choose a folder in it.")
    partial = out.with_name(out.name + ".partial")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{named} exists already: choose a new folder, or remove it.")
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(unfinished_folder(partial))
    except BlockingIOError:
        raise ValueError(
            f"{named} is being made by another process: wait for it, or choose another folder."
        ) from None
    except OSError as error:
        raise ValueError(
            f"{named} cannot be made ({error.strerror}): choose a folder where you may write."
        ) from None
    try:
        with lock:
            yield partial
            for path in partial.iterdir():
                sync(path)
            sync(partial)
            partial.replace(out)
            sync(out.parent)
    except OSError as error:
        is_ours = error.errno in _NO_ROOM or str(error.filename).startswith(str(partial))
        if not is_ours:
            raise
        raise ValueError(
            f"{named} cannot be written ({error.strerror}): free some space there, or choose "
            "another folder."
        ) from None


@contextlib.contextmanager
def unfinished_folder(path: Path, *, is_waiting: bool = False) -> Iterator[Path]:
    """An empty folder for what is to be whole or absent: deleted at the end, unless renamed.

    No other process claims it, which follows it when it is renamed; a killed one's is cleared.

    Args:
        is_waiting: Wait for whoever holds it: right for a name of one's own, which others hold only
            to see whether its maker was killed.

    Raises:
        BlockingIOError: Another process holds it, and is not waited for.
    """

    def open_folder() -> int:
        while True:
            path.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process has just cleared it
                return os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    with _locked(path, open_folder, is_waiting=is_waiting) as folder:
        try:
            for inner in path.iterdir():
                remove_tree(inner)
            yield path
        finally:
            if is_named_so(folder, path):  # else the name may be another process's by now
                remove_tree(path)


def is_file_name(name: object) -> bool:
    """Whether ``name`` is that of something in a folder: no path, and not the folder above."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
    )


def remove_tree(path: Path) -> None:
    """Delete a file or a folder with all that is in it; what is gone already is no error."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            for inner in path.iterdir():
                remove_tree(inner)
            path.rmdir()
        else:
            path.unlink()


def sync(path: Path) -> None:
    """Put a file on disk, or the names in a folder: without this a rename may be lost."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


@contextlib.contextmanager
def _locked(path: Path, make: Callable[[], int], *, is_waiting: bool = True) -> Iterator[int]:
    """A descriptor of what ``make`` opens at ``path``, locked, and still of that name."""
    while True:
        descriptor = make()
        try:
            if not has_locked(descriptor, is_waiting=is_waiting):
                raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
            if is_named_so(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)
